"""How much one rank may hold and run at once. Fixed for the life of its process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankLimits:
    """Sizes that bound a rank's schedule. An expert-only rank has `num_blocks=0`.

    Raises ValueError for a combination under which some sequence would never be scheduled.
    """

    num_blocks: int
    block_size: int
    """Tokens per KV block."""
    max_num_seqs: int
    """Sequences that may be running (hold blocks) at once."""
    max_num_batched_tokens: int
    """Tokens that go through the model in one step."""
    max_model_len: int
    """Prompt plus output tokens of one sequence."""
    enable_prefix_caching: bool = True
    prefill_tokens_beside_decodes: int | None = None
    """Prefill tokens per step while some member of the domain decodes; None: no such bound, and 0:
    by `core.pace`. Steps are lock-step: one rank's long prefill holds back every stream of the
    instance."""

    def __post_init__(self) -> None:
        if min(self.block_size, self.max_num_seqs, self.max_model_len) < 1 or self.num_blocks < 0:
            raise ValueError(f"block size, sequence and length limits must be positive: {self}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below "
                f"max_num_seqs={self.max_num_seqs}: running sequences could not all decode in one "
                "step; raise the first or lower the second"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of this many tokens."""
        return -(-num_tokens // self.block_size)
