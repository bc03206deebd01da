"""Whether the memory that an instance may take can hold it at all: said before anything loads."""

from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.config import EngineConfig
from revivemoe.executor.spec import ENGINE_BYTES, GRAPH_BYTES, RANK_BYTES
from revivemoe.host.memory import Limit, capacity, taken_bytes

MIB = 1 << 20


def check_memory(config: EngineConfig, info: CheckpointInfo) -> None:
    """`config` is resolved. Raises ValueError."""
    if config.device == "cpu":
        here = min(taken_bytes(), ENGINE_BYTES)
        graphs = GRAPH_BYTES * config.data_parallel_size if config.in_graphs else 0
        check(capacity(), here, weight_bytes(config, info), config.num_ranks, graphs)


def weight_bytes(config: EngineConfig, info: CheckpointInfo) -> int:
    """Of all ranks, once everything is loaded: experts in their slots, and in the host's cache; the
    rest in each attention rank, but for dense layers that a group shares.
    """
    import torch  # it wants a temporary directory, which is found first

    from revivemoe.model.host_cache import expert_bytes

    dtype: torch.dtype = getattr(torch, config.dtype)
    expert, layers = expert_bytes(info.model_dir, dtype), len(info.moe_layers)
    attention_ranks = config.data_parallel_size
    expert_ranks = config.expert_ranks or attention_ranks
    copies = 2 if config.expert_host_cache else 1
    slots = info.num_experts * copies + config.redundant_experts
    slots += config.spare_expert_slots * expert_ranks
    rest = info.num_parameters * dtype.itemsize - expert * layers * info.num_experts
    dense = 0
    if config.dense_ffn_tp > 1:
        dense = len(info.dense_layers) * 3 * info.hidden_size * info.dense_width * dtype.itemsize
    groups = attention_ranks // config.dense_ffn_tp
    total: int = expert * layers * slots + attention_ranks * max(0, rest - dense) + groups * dense
    return total


def check(limit: Limit, here: int, weights: int, num_ranks: int, graphs: int = 0) -> None:
    """`here`: bytes that this process has taken already; `graphs`: that compiled layers take.
    Raises ValueError.
    """
    processes = ENGINE_BYTES + num_ranks * RANK_BYTES + graphs
    needed, can_be_had = weights + processes, min(limit.total, limit.free + here)
    if can_be_had > needed:
        return
    free = "" if limit.total <= needed else f", of which {can_be_had // MIB} MiB can be had now,"
    raise ValueError(
        f"{limit.total // MIB} MiB of memory ({limit.path}){free} cannot hold the model: the "
        f"weights of all ranks take {weights / MIB:.0f} MiB and the processes of {num_ranks} ranks "
        f"{processes // MIB} MiB, before any KV cache: raise the limit, or serve with fewer ranks"
    )
