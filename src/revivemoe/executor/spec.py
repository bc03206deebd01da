"""What a rank process is told when it is launched."""

import msgspec

from revivemoe.core.limits import RankLimits
from revivemoe.ids import Incarnation, LayerId, RankId

ENGINE_BYTES, RANK_BYTES = 512 << 20, 64 << 20
"""What processes take without weights and KV cache. Engine and fork server together, whose imports
the ranks share: 447 MiB measured; and each rank: 39, and 16 more under load (tiny model)."""
GRAPH_BYTES = 128 << 20
"""What an attention rank takes besides once it has compiled its layers: 110 MiB measured."""


class InstanceSize(msgspec.Struct, frozen=True):
    """Of all that shares the memory of this host."""

    num_ranks: int = 1
    attention_ranks: int = 1
    expert_slots: int = 0
    """Over all layers and ranks, and what the host's cache of experts holds."""


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one rank process needs. Travels as msgpack through the fork server."""

    rank: RankId
    incarnation: Incarnation
    model_dir: str
    attention: bool = True
    """Whether it has the attention role: then it holds all of the model but routed experts."""
    slots: dict[LayerId, tuple[int, ...]]
    """For each MoE layer, the expert in each of this rank's slots; -1 where empty. No slots at all
    without the expert role."""
    dense_layers: tuple[LayerId, ...] = ()
    """Dense layers that groups of ranks share (--dense-ffn-tp)."""
    dense_ffn_tp: int = 1
    dense_shards: tuple[int, ...] = ()
    """Shards of each of them that this rank starts with."""
    num_experts: int
    top_k: int
    dtype: str
    """float32 | bfloat16 | float16"""
    device: str
    """cpu | cuda:N"""
    threads: int
    """Compute threads of this process."""
    limits: RankLimits
    """Without the blocks of its KV cache, which follow from the memory."""
    kernels: str = "auto"
    """auto | native | torch"""
    batch_invariant: bool = False
    """No row's bits may depend on the rows beside it."""
    in_graphs: bool = False
    """Layers are compiled."""
    compile_cache: tuple[str, ...] = ()
    """Folders where what the compiler makes may be kept, the best first."""
    num_kv_blocks: int | None
    """None: as many as are useful and fit into this rank's share of memory."""
    kv_memory_share: float
    """Share of the memory now free that this rank's KV cache may take when sized by itself."""
    longest_sequences: int = 32
    """It then has room for so many sequences of the longest length, at most."""
    instance: InstanceSize = InstanceSize()
    commands: str
    """ZeroMQ endpoint that this process binds; what the engine sends before that waits."""
    reports: str
    """ZeroMQ endpoint of the engine: everything that ranks say."""
    weights: str = ""
    """ZeroMQ endpoint that this process binds: its experts' weights, for its peers."""
    heartbeat_s: float = 0.1


class SegmentSpec(msgspec.Struct, frozen=True):
    """Dimensions of the shared memory of one instance, from which its size follows."""

    num_ranks: int
    channels: int
    max_tokens: int
    hidden: int
    itemsize: int
    top_k: int


class HostCacheSpec(msgspec.Struct, frozen=True):
    """Of which checkpoint the ranks of this host share converted experts in memory."""

    model_dir: str
    layers: tuple[LayerId, ...]
    num_experts: int
    dtype: str
