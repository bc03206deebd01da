"""The fake forward of one rank: layers with dispatch and combine, fake KV, tokens by checksum."""

from collections.abc import Generator
from random import Random

from revivemoe.core.fake_kv import FakeKv
from revivemoe.core.rank import Rank
from revivemoe.core.step import Batch, ScheduledSequence, StepResult
from revivemoe.sim.answers import logprob_of, next_token
from revivemoe.sim.requests import CommunicationFailed, DomainLeft, Meet, Request, Work

NUM_LAYERS = 2
WORK_S = 0.0015
"""Own work of one phase of one layer."""
WORK_PER_TOKEN_S = 0.00005

Steps = Generator[Request, list[object] | None, None]


class Forward:
    """Runs batches of one rank. Reads and writes the fake KV as attention would."""

    def __init__(self, rank: Rank, rng: Random) -> None:
        self.kv = FakeKv(rank.limits.block_size)
        self._rank, self._rng = rank, rng
        self._known: set[str] = set()
        """Phases that have run before: only for these is it known how long they take."""

    def execute(self, batch: Batch, mask_key: bytes) -> Steps:
        """All layers; a step that is cut has written any part of its KV."""
        self.kv.check(batch)
        try:
            yield from self.serve(batch.num_tokens)
        except (DomainLeft, CommunicationFailed):
            written = self._rng.randint(0, batch.num_tokens)
            self.kv.write(batch, mask_key, max_tokens=written)
            raise
        self.kv.write(batch, mask_key)

    def serve(self, num_tokens: int = 0) -> Steps:
        """The experts' part, which every member takes; attention only with tokens."""
        for layer in range(NUM_LAYERS):
            if num_tokens:
                yield self.work("attention", layer, num_tokens)
            yield Meet("dispatch", layer, None)
            yield self.work("experts", layer, num_tokens)
            yield Meet("combine", layer, None)

    def work(self, phase: str, layer: int, num_tokens: int) -> Work:
        predicted_s = WORK_S + WORK_PER_TOKEN_S * num_tokens
        budget_s = predicted_s if phase in self._known else None
        self._known.add(phase)
        return Work(phase, layer, predicted_s * (0.5 + self._rng.random()), budget_s)

    def check(self) -> None:
        """Assert that every block named by a table or by the prefix cache holds that KV."""
        self._rank.check_invariants()
        for sequence in self._rank.queues.live.values():
            self.kv.check_sequence(sequence)
        self.kv.check_cache(self._rank.pool.cached())


def results_of(batch: Batch) -> list[StepResult]:
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
