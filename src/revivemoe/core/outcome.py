"""What one sequence's share of a step comes to, worked out before anything is changed."""

from dataclasses import dataclass

from revivemoe.core.digest import Digest
from revivemoe.core.limits import RankLimits
from revivemoe.core.step import ScheduledSequence, StepResult
from revivemoe.ids import BlockId
from revivemoe.messages.tokens import CommittedToken, PromptLogprobs


@dataclass(frozen=True, slots=True)
class Outcome:
    """The changes to make at commit for one `ScheduledSequence`."""

    item: ScheduledSequence
    num_computed: int
    num_prefilled: int
    """Tokens of this share that were not a plain decode."""
    token: CommittedToken | None
    prompt_logprobs: PromptLogprobs | None
    names: list[tuple[BlockId, Digest]]
    """Blocks that are now full of committed KV, and what they may be found by."""


def outcome_of(item: ScheduledSequence, result: StepResult, limits: RankLimits) -> Outcome:
    """The outcome of one share. Asserts that the result is one for this share."""
    assert item.samples == (result.token_id is not None), "a token is drawn at the end only"
    return Outcome(
        item=item,
        num_computed=item.start + item.count,
        num_prefilled=0 if item.is_decode else item.count,
        token=_token(item, result),
        prompt_logprobs=_prompt_logprobs(item, result),
        names=_names(item, limits),
    )


def _token(item: ScheduledSequence, result: StepResult) -> CommittedToken | None:
    if result.token_id is None:
        return None
    sequence = item.sequence
    return CommittedToken(
        seq_id=sequence.seq_id,
        position=len(sequence.output_ids),
        token_id=result.token_id,
        logprobs=result.logprobs,
    )


def _prompt_logprobs(item: ScheduledSequence, result: StepResult) -> PromptLogprobs | None:
    """The entries still owed; those sent before a preemption or migration are left out."""
    owed = item.num_prompt_logprobs
    if not owed:
        return None
    assert len(result.prompt_logprobs) == owed, "one entry for each prompt position of the share"
    sent = item.sequence.prompt_logprobs_done - item.start
    assert sent >= 0, "owed prompt log-probabilities have been skipped"
    if sent >= owed:
        return None
    return PromptLogprobs(
        seq_id=item.sequence.seq_id,
        start=item.start + 1 + sent,
        entries=list(result.prompt_logprobs[sent:]),
    )


def _names(item: ScheduledSequence, limits: RankLimits) -> list[tuple[BlockId, Digest]]:
    if not (limits.enable_prefix_caching and item.sequence.cacheable):
        return []
    size = limits.block_size
    first, end = item.start // size, (item.start + item.count) // size
    if first == end:
        return []
    digests = item.sequence.block_digests(size, end)
    return list(zip(item.block_table[first:end], digests[first:end], strict=True))
