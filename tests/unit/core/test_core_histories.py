"""Random histories of one rank, with every read of its KV checked."""

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from core_harness import VOCABULARY, Story, limits
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from revivemoe.core.journal import Allocated, Preempted, Shared

# Prompts begin alike, so that they share prefixes.
STEMS = [[1, 2, 3, 4, 1, 2, 3, 4, 4, 4, 4, 4], [1, 2, 3, 4, 2, 2, 2, 2], [3], [4, 4, 4, 4, 1]]
PROMPTS = st.builds(
    lambda stem, keep, tail: stem[:keep] + tail,
    st.sampled_from(STEMS),
    st.integers(1, 12),
    st.lists(st.integers(1, VOCABULARY - 1), max_size=3),
)
WRITTEN = st.none() | st.integers(0, 12)


def small_story(
    num_blocks: int, block_size: int, max_num_seqs: int, spare_tokens: int, caching: bool
) -> Story:
    return Story(
        limits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_tokens,
            max_model_len=min(24, num_blocks * block_size),
            enable_prefix_caching=caching,
        )
    )


class Histories(RuleBasedStateMachine):
    """Requests come and go, steps are cut anywhere, masks change; outputs must not."""

    @initialize(
        num_blocks=st.integers(4, 10),
        block_size=st.sampled_from([2, 4]),
        max_num_seqs=st.integers(1, 4),
        spare_tokens=st.integers(0, 8),
        caching=st.booleans(),
    )
    def start(self, **sizes: int) -> None:
        self.story = small_story(**sizes)

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 20),
        echo=st.booleans(),
        eos=st.booleans(),
        age=st.integers(0, 3),
    )
    def ask(self, prompt: list[int], max_tokens: int, echo: bool, eos: bool, age: int) -> None:
        self.story.ask(prompt, max_tokens, echo, eos, age)

    @precondition(lambda self: self.story.rank.queues.live)
    @rule(data=st.data(), forever=st.booleans())
    def abort(self, data: st.DataObject, forever: bool) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.story.rank.queues.live)))
        self.story.abort(seq_id) if forever else self.story.readd(seq_id)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.story.step()

    @rule(written=WRITTEN)
    def cut_step(self, written: int | None) -> None:
        self.story.cut_step(written)

    @rule(mask_key=st.sampled_from([b"", b"", b"masked"]), written=WRITTEN)
    def fence(self, mask_key: bytes, written: int | None) -> None:
        self.story.cut_by_fence(mask_key, written)

    def teardown(self) -> None:
        if hasattr(self, "story"):
            self.story.end()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# A failing history is shrunk for up to five minutes; cut off by the timeout it would not be shown.
TestHistories.pytestmark = [pytest.mark.timeout(400)]


class Storm:
    """A history under pressure: more sequences than blocks, and every other step is cut."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.story = small_story(
            num_blocks=self.rng.randint(5, 12),
            block_size=self.rng.choice([2, 2, 4]),
            max_num_seqs=self.rng.randint(2, 4),
            spare_tokens=self.rng.randint(0, 8),
            caching=self.rng.random() < 0.9,
        )

    def run(self, num_actions: int = 60) -> None:
        for _ in range(num_actions):
            if len(self.story.rank.queues.live) < 5:
                self._ask()
            self.rng.choices(
                [self.story.step, self._cut, self._fence, self._abort], weights=[8, 8, 2, 1]
            )[0]()
        self.story.end()

    def _ask(self) -> None:
        rng = self.rng
        stem = rng.choice(STEMS)[: rng.randint(1, 12)]
        tail = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(0, 2))]
        echo, eos = rng.random() < 0.2, rng.random() < 0.3
        self.story.ask(stem + tail, rng.randint(1, 20), echo, eos, age=rng.choice([0, 0, 2]))

    def _written(self) -> int | None:
        return self.rng.choice([None, 0, 1, 2, 3, 5, 20])

    def _cut(self) -> None:
        before = self.story.rank.stats()
        written = self._written()
        self.story.cut_step(written)
        how = "before" if written is None else "during"
        self.seen.update(f"{name} {how} forward" for name in self.story.last_cut)
        self.seen["lost"] += self.story.rank.stats().preemptions - before.preemptions

    def _fence(self) -> None:
        self.story.cut_by_fence(self.rng.choice([b"", b"", b"masked"]), self._written())

    def _abort(self) -> None:
        live = sorted(self.story.rank.queues.live)
        if live:
            self.rng.choice([self.story.abort, self.story.readd])(self.rng.choice(live))


def test_storms_meet_every_kind_of_undo_and_lose_nothing():
    seen: Counter[str] = Counter()
    for seed in range(90):
        storm = Storm(seed)
        try:
            storm.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        seen += storm.seen
    kinds = [kind.__name__ for kind in (Allocated, Preempted, Shared)] + ["Evicted"]
    for kind in kinds:
        for how in ("before", "during"):
            assert seen[f"{kind} {how} forward"] > 20, seen
    assert seen["lost"] > 20, seen
    assert seen["Preempted during forward"] > seen["lost"], "none was restored"
