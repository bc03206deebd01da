"""The fake forward of one rank: layers with dispatch and combine, fake KV, tokens by checksum."""

from collections.abc import Generator
from random import Random
from typing import TypeVar

from revivemoe.core.effects import Broken, Left, Place
from revivemoe.core.rank import Rank
from revivemoe.core.step import Batch, ScheduledSequence, StepResult
from revivemoe.sim.answers import logprob_of, next_token
from revivemoe.sim.fake_kv import FakeKv
from revivemoe.sim.mishaps import Mishaps
from revivemoe.sim.process import Process
from revivemoe.sim.requests import Meet, Request, Work

NUM_LAYERS = 2
WORK_S = 0.0015
"""Own work of one phase of one layer."""
WORK_PER_TOKEN_S = 0.00005
SEEN_AT_ONCE = 0.25
"""How often NaN ends the step where it is met, rather than behind the last layer."""

T = TypeVar("T")
Doing = Generator[Request, list[object] | None, T]
Steps = Doing[None]


class FakeForward:
    """Runs batches of one rank. Reads and writes the fake KV as attention would."""

    def __init__(self, process: Process, rank: Rank, rng: Random, mishaps: Mishaps) -> None:
        self.kv = FakeKv(rank.limits.block_size)
        self.place: Place | None = None
        """Where the first NaN of the step appeared here; where it was produced before others."""
        self._process, self._rank, self._rng, self._mishaps = process, rank, rng, mishaps

    def run(self, batch: Batch, mask_key: bytes) -> Steps:
        """A step, with tokens or only for the others' rows. Raises Left, Broken."""
        self.place = None
        if batch.items:
            yield from self._execute(batch, mask_key)
        else:
            yield from self._layers(0)
            self._refuse_nan()

    def _execute(self, batch: Batch, mask_key: bytes) -> Steps:
        """All layers; a step that is cut has written any part of its KV."""
        self.kv.check(batch)
        self._mishaps.runs(self._process, batch)
        try:
            yield from self._layers(batch.num_tokens)
            yield from self._work("sample", -1, len(batch.items))
            if self._mishaps.corrupts(self._process, "sample"):
                self._note(-1, "sample", True)
            self._refuse_nan()
        except (Left, Broken):
            written = self._rng.randint(0, batch.num_tokens)
            self.kv.write(batch, mask_key, max_tokens=written)
            raise
        self.kv.write(batch, mask_key)

    def _layers(self, num_tokens: int) -> Steps:
        """The experts' part, which every member takes; attention only with tokens."""
        for layer in range(NUM_LAYERS):
            broken = False
            if num_tokens:
                yield from self._work("attention", layer, num_tokens)
                broken = self._mishaps.corrupts(self._process, "attention")
            yield from self._exchange("dispatch", layer, broken, "attention", "experts")
            yield from self._work("experts", layer, num_tokens)
            broken = self._mishaps.corrupts(self._process, "experts")
            yield from self._exchange("combine", layer, broken, "experts", "combine")

    def _work(self, phase: str, layer: int, num_tokens: int) -> Steps:
        """Own work. How long it will take is known once it has been done before."""
        self._process.progress.work(phase, layer, self._process.step, num_tokens)
        usual_s = WORK_S + WORK_PER_TOKEN_S * num_tokens
        yield Work(phase, layer, usual_s * (0.5 + self._rng.random()))

    def _exchange(self, phase: str, layer: int, broken: bool, producer: str, victim: str) -> Steps:
        """Rows to and from the experts. NaN may end the step at once, or behind the last layer."""
        if broken:
            self._note(layer, producer, True)
        self._process.progress.work(phase, layer, self._process.step, 0)
        values = yield Meet(phase, layer, broken)
        if values is not None and any(values) and not broken:
            self._note(layer, victim, False)

    def _note(self, layer: int, phase: str, produced_here: bool) -> None:
        if self.place is None or (produced_here and not self.place.produced_here):
            self.place = Place(layer, phase, produced_here)
        if self._rng.random() < SEEN_AT_ONCE:
            self._refuse_nan()

    def _refuse_nan(self) -> None:
        if self.place is not None:
            raise Broken(f"NaN in {self.place.phase}, layer {self.place.layer}")

    def check(self) -> None:
        """Assert that every block named by a table or by the prefix cache holds that KV."""
        self._rank.check_invariants()
        for sequence in self._rank.queues.live.values():
            self.kv.check_sequence(sequence)
        self.kv.check_cache(self._rank.pool.cached())


def results_of(batch: Batch) -> list[StepResult]:
    """What the model makes of a batch."""
    return [_result_of(item) for item in batch.items]


def _result_of(item: ScheduledSequence) -> StepResult:
    sequence, history = item.sequence, item.sequence.history
    owed = range(item.start + 1, item.start + 1 + item.num_prompt_logprobs)
    scores = tuple(logprob_of(history, position) for position in owed)
    if not item.samples:
        return StepResult(token_id=None, prompt_logprobs=scores)
    token = next_token(history, sequence.params.choice)
    scored = sequence.params.logprobs is not None
    logprobs = logprob_of([*history, token], len(history)) if scored else None
    return StepResult(token_id=token, logprobs=logprobs, prompt_logprobs=scores)
