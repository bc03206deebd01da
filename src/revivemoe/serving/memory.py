"""Whether the memory that an instance may take can hold it at all: said before anything loads."""

from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.config import EngineConfig
from revivemoe.executor.spec import ENGINE_BYTES, RANK_BYTES
from revivemoe.host.memory import Limit, capacity

MIB = 1 << 20
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_memory(config: EngineConfig, info: CheckpointInfo) -> None:
    """`config` is resolved. Raises ValueError."""
    if config.device == "cpu":
        check(capacity(), info.num_parameters * ITEMSIZE[config.dtype], config.num_ranks)


def check(limit: Limit, weights: int, num_ranks: int) -> None:
    """All experts lie in memory at least once, and so does the rest. Raises ValueError."""
    processes = ENGINE_BYTES + num_ranks * RANK_BYTES
    if limit.total <= weights + processes:
        raise ValueError(
            f"{limit.total // MIB} MiB of memory ({limit.path}) cannot hold the model: its weights "
            f"take {weights / MIB:.0f} MiB and the processes of {num_ranks} ranks "
            f"{processes // MIB} MiB, before any KV cache: raise the limit, or serve with fewer "
            "ranks"
        )
