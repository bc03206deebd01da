"""The fake forward of one rank: layers with dispatch and combine, fake KV, tokens by checksum."""

from collections.abc import Generator
from random import Random

from revivemoe.core.rank import Rank
from revivemoe.core.step import Batch, ScheduledSequence, StepResult
from revivemoe.messages.reports import Pace
from revivemoe.sim.answers import logprob_of, next_token
from revivemoe.sim.fake_kv import FakeKv
from revivemoe.sim.mishaps import Mishaps
from revivemoe.sim.process import Process
from revivemoe.sim.requests import (
    CommunicationFailed,
    DomainLeft,
    Meet,
    NumbersBroken,
    Request,
    Work,
)

NUM_LAYERS = 2
WORK_S = 0.0015
"""Own work of one phase of one layer."""
WORK_PER_TOKEN_S = 0.00005
PACE_WEIGHT = 0.2

Steps = Generator[Request, list[object] | None, None]


class Forward:
    """Runs batches of one rank. Reads and writes the fake KV as attention would."""

    def __init__(self, process: Process, rank: Rank, rng: Random, mishaps: Mishaps) -> None:
        self.kv = FakeKv(rank.limits.block_size)
        self._process, self._rank, self._rng, self._mishaps = process, rank, rng, mishaps

    def execute(self, batch: Batch, mask_key: bytes) -> Steps:
        """All layers; a step that is cut has written any part of its KV."""
        self.kv.check(batch)
        self._mishaps.runs(self._process, batch)
        try:
            yield from self.serve(batch.num_tokens)
            yield from self._work("sample", -1, len(batch.items))
            if self._mishaps.corrupts(self._process, "sample"):
                raise NumbersBroken("sample", -1, produced_here=True)
        except (DomainLeft, CommunicationFailed, NumbersBroken):
            written = self._rng.randint(0, batch.num_tokens)
            self.kv.write(batch, mask_key, max_tokens=written)
            raise
        self.kv.write(batch, mask_key)

    def serve(self, num_tokens: int = 0) -> Steps:
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
        predicted_s = WORK_S + WORK_PER_TOKEN_S * num_tokens
        size = max(0, num_tokens - 1).bit_length()
        known = self._process.paces.get((phase, size))
        seconds = predicted_s * (0.5 + self._rng.random())
        began = self._process.now
        yield Work(phase, layer, seconds, predicted_s if known else None)
        took_s = self._process.now - began
        before_s, count = (known.seconds, known.count) if known else (took_s, 0)
        mean_s = before_s + PACE_WEIGHT * (took_s - before_s)
        self._process.paces[phase, size] = Pace(phase, size, mean_s, count + 1)

    def _exchange(self, phase: str, layer: int, broken: bool, producer: str, victim: str) -> Steps:
        """Rows to and from the experts. A producer of NaN sees it before or after it sends."""
        if broken and self._rng.random() < 0.5:
            raise NumbersBroken(producer, layer, produced_here=True)
        values = yield Meet(phase, layer, broken)
        if broken:
            raise NumbersBroken(producer, layer, produced_here=True)
        if values is not None and any(values):
            raise NumbersBroken(victim, layer, produced_here=False)

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
