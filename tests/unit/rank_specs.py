"""What a rank may be told, for tests in which it does not matter much."""

from revivemoe.core.limits import RankLimits
from revivemoe.executor.spec import RankSpec

LIMITS = RankLimits(
    num_blocks=0,
    block_size=16,
    max_num_seqs=2,
    max_num_batched_tokens=64,
    max_model_len=160,
    prefill_tokens_beside_decodes=0,
)
SPEC = RankSpec(
    rank=3,
    incarnation=1,
    model_dir="",
    slots={},
    num_experts=4,
    top_k=2,
    dtype="float32",
    device="cpu",
    threads=1,
    limits=LIMITS,
    num_kv_blocks=None,
    kv_memory_share=0.25,
    longest_sequences=2,
    commands="",
    reports="",
)
