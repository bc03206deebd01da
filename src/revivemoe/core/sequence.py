"""One generated sequence as its attention rank holds it."""

from dataclasses import dataclass, field

from revivemoe.core.digest import Digest, extend_chain
from revivemoe.ids import BlockId, SeqId
from revivemoe.messages.tokens import SequenceSpec
from revivemoe.sampling_params import FinishReason, SamplingParams, finish_reason


@dataclass(eq=False, slots=True)
class Sequence:
    """Committed tokens of one sequence and where their KV lies. Owned and changed by one rank.

    While waiting it has no blocks. Between steps a running sequence's table covers exactly the
    positions [0, num_computed); inside a step it also covers the positions being computed.
    """

    seq_id: SeqId
    params: SamplingParams
    order: tuple[int, int]
    """(arrival, seq_id): the smaller is the older. Ids break the tie between choices."""
    prompt_ids: list[int]
    output_ids: list[int]
    history: list[int]
    """Prompt then output: one list, because the model reads slices across the boundary."""
    prompt_logprobs_done: int = 0
    """Entries sent so far: prompt positions 1 ... prompt_logprobs_done need not be sent again."""
    num_computed: int = 0
    """Tokens whose KV is in the blocks and committed."""
    block_table: list[BlockId] = field(default_factory=list)
    mask_key: bytes = b""
    """Mask under which this sequence's KV began, and the root of `digests`."""
    cacheable: bool = True
    """False once KV of a second mask key was added: such blocks have no name to be shared by."""
    digests: list[Digest] = field(default_factory=list)
    """Names of the history's first full blocks, as far as they have been needed. Only a memo."""

    @classmethod
    def from_spec(cls, spec: SequenceSpec) -> "Sequence":
        """A waiting sequence with its own copies of the token lists."""
        return cls(
            seq_id=spec.seq_id,
            params=spec.params,
            order=(spec.arrival, spec.seq_id),
            prompt_ids=list(spec.prompt_ids),
            output_ids=list(spec.output_ids),
            history=[*spec.prompt_ids, *spec.output_ids],
            prompt_logprobs_done=spec.prompt_logprobs_done,
        )

    @property
    def num_remaining(self) -> int:
        """Tokens to run through the model before the next can be drawn; 1 while decoding."""
        return len(self.history) - self.num_computed

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether some prompt log-probability was asked for and is not sent yet."""
        if self.params.prompt_logprobs is None:
            return False
        return self.prompt_logprobs_done < len(self.prompt_ids) - 1

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the prefix cache may stand in for.

        The last token has to be computed in any case: its logits give the next one. So do the
        tokens whose logits give prompt log-probabilities that are still owed.
        """
        limit = len(self.history) - 1
        return min(limit, self.prompt_logprobs_done) if self.owes_prompt_logprobs else limit

    def finished(self, max_model_len: int) -> FinishReason | None:
        """Why the sequence is over, or None while it goes on."""
        return finish_reason(self.params, len(self.prompt_ids), self.output_ids, max_model_len)

    def append(self, token_id: int) -> None:
        """Take in one committed token."""
        self.output_ids.append(token_id)
        self.history.append(token_id)

    def rebase(self, mask_key: bytes) -> None:
        """Name blocks from another root."""
        if mask_key != self.mask_key:
            self.mask_key = mask_key
            self.digests.clear()

    def block_digests(self, block_size: int, num_blocks: int) -> list[Digest]:
        """Names of the first `num_blocks` full blocks of the history."""
        extend_chain(self.digests, self.mask_key, self.history, block_size, num_blocks)
        return self.digests[:num_blocks]
