"""One rank, a fake model and a fake KV cache: everything around `revivemoe.core.rank` in a test."""

from typing import Any
from zlib import crc32

import msgspec

from revivemoe.core.journal import Allocated, Preempted
from revivemoe.core.limits import RankLimits
from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch, Run, ScheduledSequence, StepResult
from revivemoe.ids import BlockId, Epoch, Incarnation, RankId, SeqId
from revivemoe.messages.reports import Tokens
from revivemoe.messages.tokens import SequenceSpec, TokenLogprobs
from revivemoe.sampling_params import SamplingParams, finish_reason
from revivemoe.sim.fake_kv import FakeKv

VOCABULARY = 5
EOS = 0


def limits(**changes: Any) -> RankLimits:
    base = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 48,
    }
    return RankLimits(**{**base, **changes})


def spec(
    seq_id: int,
    prompt: list[int],
    max_tokens: int = 4,
    *,
    arrival: int | None = None,
    output: list[int] | None = None,
    logprobs_done: int = 0,
    **params: Any,
) -> SequenceSpec:
    return SequenceSpec(
        seq_id=SeqId(seq_id),
        prompt_ids=prompt,
        output_ids=output or [],
        params=SamplingParams(seed=0, max_tokens=max_tokens, **params),
        arrival=seq_id if arrival is None else arrival,
        prompt_logprobs_done=logprobs_done,
    )


def next_token(history: list[int]) -> int:
    """The fake model: any function of the whole history will do."""
    return crc32(bytes(history)) % VOCABULARY


def logprob_at(history: list[int], position: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(crc32(bytes(history[: position + 1])) % 97), top=[])


def fault_free(asked: SequenceSpec, max_model_len: int) -> list[int]:
    """What a sequence must come to, whatever happens on the way."""
    output: list[int] = []
    while not finish_reason(asked.params, len(asked.prompt_ids), output, max_model_len):
        output.append(next_token(asked.prompt_ids + output))
    return output


def result_of(item: ScheduledSequence) -> StepResult:
    history = item.sequence.history
    owed = range(item.start + 1, item.start + 1 + item.num_prompt_logprobs)
    return StepResult(
        token_id=next_token(history) if item.samples else None,
        prompt_logprobs=tuple(logprob_at(history, position) for position in owed),
    )


def snapshot(rank: Rank) -> dict[str, Any]:
    """Everything undo has to restore, up to the order of the free list."""
    return {
        "state": rank.state,
        "waiting": [(s.seq_id, s.num_computed) for s in rank.queues.waiting],
        "running": [
            (s.seq_id, s.num_computed, tuple(s.block_table), s.mask_key, s.cacheable)
            for s in rank.queues.running
        ],
        "tokens": {s.seq_id: (tuple(s.history), s.prompt_logprobs_done) for s in live(rank)},
        "free": {b for b in range(rank.pool.num_blocks) if rank.pool.is_free(BlockId(b))},
        "cached": rank.pool.cached(),
        "stats": rank.stats(),
    }


def live(rank: Rank) -> list[Any]:
    return list(rank.queues.live.values())


class Solo:
    """A domain of one rank, driven step by step, with the engine's token log beside it."""

    def __init__(self, rank_limits: RankLimits | None = None) -> None:
        self.limits = rank_limits or limits()
        self.rank = Rank(RankId(0), Incarnation(1), self.limits)
        self.kv = FakeKv(self.limits.block_size)
        self.log: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.epoch = 0
        self.mask_key = b""
        self.wakes = 0
        self.last_cut: list[str] = []
        """Kinds of records in the journal of the step cut last."""

    def enter(self, mask_key: bytes = b"") -> "Solo":
        """Go to the next epoch."""
        self.epoch, self.mask_key = self.epoch + 1, mask_key
        ack = self.rank.fence(Epoch(self.epoch))
        assert ack is not None
        assert self.rank.configure(Epoch(self.epoch), ack.next_step, mask_key, self.wakes)
        self.check()
        return self

    def add(self, asked: SequenceSpec) -> None:
        self.log.setdefault(asked.seq_id, list(asked.output_ids))
        self.logprobs.setdefault(asked.seq_id, [])
        self.rank.add(asked)
        self.wake()

    def wake(self) -> None:
        self.wakes += 1
        self.rank.wake(self.wakes)

    def begin(self) -> Batch | None:
        """Open a step; None if the rank has parked or is parked."""
        if not isinstance(self.rank.state, InDomain):
            return None
        batch = self.rank.begin_step()
        agreement = self.rank.agree([self.rank.header()])
        self.rank.check_invariants()
        self.kv.check(batch)
        return batch if isinstance(agreement, Run) else None

    def step(self) -> Tokens | None:
        if (batch := self.begin()) is None:
            return None
        self.rank.mark_executing()
        self.kv.write(batch, self.mask_key)
        tokens = self.rank.commit([result_of(item) for item in batch.items])
        self._take(tokens)
        self.check()
        return tokens

    def cut_step(self, written: int | None) -> None:
        """A step that fails after `written` tokens; None: before its forward began."""
        if not isinstance(self.rank.state, InDomain):
            return
        before = snapshot(self.rank)
        self.last_cut = []
        batch = self.begin()
        if batch is None:
            return
        records = list(self.rank.journal.records)
        self.last_cut = [type(record).__name__ for record in records]
        self.last_cut += ["Evicted" for r in records if isinstance(r, Allocated) and r.evicted]
        if written is not None:
            self.rank.mark_executing()
            self.kv.write(batch, self.mask_key, max_tokens=written)
        assert self.rank.roll_back()
        assert not self.rank.roll_back()
        self.check()
        self._compare(before, records if written is not None else [])

    def drain(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.rank.queues.live:
                return
            self.step()
        raise AssertionError("sequences do not finish")

    def check(self) -> None:
        self.rank.check_invariants()
        self.kv.check_cache(self.rank.pool.cached())
        for sequence in live(self.rank):
            self.kv.check_sequence(sequence)

    def _take(self, tokens: Tokens) -> None:
        for token in tokens.tokens:
            assert token.position == len(self.log[token.seq_id])
            self.log[token.seq_id].append(token.token_id)
        for part in tokens.prompt_logprobs:
            assert part.start == len(self.logprobs[part.seq_id]) + 1
            assert part.entries
            self.logprobs[part.seq_id] += part.entries

    def _compare(self, before: dict[str, Any], records: list[Any]) -> None:
        """What was executed and undone has lost what may be overwritten, and nothing else."""
        allocated = {r.block for r in records if isinstance(r, Allocated)}
        lost = set()
        for i, record in enumerate(records):
            later = {r.block for r in records[i:] if isinstance(r, Allocated)}
            if isinstance(record, Preempted) and later & set(record.blocks):
                lost.add(record.sequence.seq_id)
        after = snapshot(self.rank)
        expected = dict(before)
        expected["running"] = [entry for entry in before["running"] if entry[0] not in lost]
        expected["cached"] = {d: b for d, b in before["cached"].items() if b not in allocated}
        if lost:
            assert {entry[0] for entry in after["waiting"]} == lost | {
                entry[0] for entry in before["waiting"]
            }
            for loose in ("waiting", "free", "stats"):
                expected[loose] = after[loose]
        assert after == expected


class Story(Solo):
    """A rank's history with the requests that were made in it, and how it has to end."""

    def __init__(self, rank_limits: RankLimits) -> None:
        super().__init__(rank_limits)
        self.asked: dict[int, SequenceSpec] = {}
        self.aborted: set[int] = set()
        self.readded = False
        self.enter()

    def ask(self, prompt: list[int], max_tokens: int, echo: bool, eos: bool, age: int) -> None:
        """A new request; with `age` as if it had come from another rank, older than others here."""
        seq_id = len(self.asked)
        asked = spec(
            seq_id,
            prompt[: self.limits.max_model_len - 1],
            max_tokens,
            arrival=max(0, seq_id - age),
            prompt_logprobs=1 if echo else None,
            eos_token_ids=(EOS,) if eos else (),
        )
        self.asked[seq_id] = asked
        self.add(asked)
        self.add(asked)
        self.check()

    def abort(self, seq_id: int) -> None:
        self.rank.abort(SeqId(seq_id))
        self.rank.abort(SeqId(seq_id))
        self.aborted.add(seq_id)
        self.check()

    def readd(self, seq_id: int) -> None:
        """As if it had come from a lost rank: prompt, committed tokens, entries already sent."""
        self.rank.abort(SeqId(seq_id))
        self.add(
            msgspec.structs.replace(
                self.asked[seq_id],
                output_ids=list(self.log[seq_id]),
                prompt_logprobs_done=len(self.logprobs[seq_id]),
            )
        )
        self.readded = True
        self.check()

    def cut_by_fence(self, mask_key: bytes, written: int | None) -> None:
        """An epoch ends in the middle of a step."""
        batch = self.begin()
        if batch is not None and written is not None:
            self.rank.mark_executing()
            self.kv.write(batch, self.mask_key, max_tokens=written)
        self.enter(mask_key)

    def end(self) -> None:
        """Finish everything. All outputs equal the run without faults, all blocks are free."""
        self.wake()
        self.drain()
        for seq_id, asked in self.asked.items():
            expected = fault_free(asked, self.limits.max_model_len)
            streamed = self.log[seq_id]
            assert streamed == expected[: len(streamed)]
            assert seq_id in self.aborted or len(streamed) == len(expected)
            self._check_logprobs(asked)
        assert self.rank.pool.num_free == self.limits.num_blocks
        assert self.readded or self.rank.stats().survivor_refills == 0

    def _check_logprobs(self, asked: SequenceSpec) -> None:
        echoed = self.logprobs[asked.seq_id]
        last = len(asked.prompt_ids) if asked.params.prompt_logprobs else 0
        expected = [logprob_at(asked.prompt_ids, p) for p in range(1, last)]
        assert echoed == expected[: len(echoed)]
        assert asked.seq_id in self.aborted or len(echoed) == len(expected)
