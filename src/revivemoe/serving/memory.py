"""Whether the memory that an instance may take can hold it at all: said before anything loads."""

import json
from pathlib import Path

from revivemoe.config import EngineConfig
from revivemoe.executor.spec import ENGINE_BYTES, RANK_BYTES
from revivemoe.host.memory import Limit, capacity

MIB = 1 << 20
ITEMSIZE = {"float32": 4, "bfloat16": 2}
INDEX = "model.safetensors.index.json"


def check_memory(config: EngineConfig, dtype: str) -> None:
    """`config` is resolved; `dtype`: the checkpoint's own. Raises ValueError."""
    if config.device != "cpu":
        return
    weights = stored_bytes(config.model_dir) * ITEMSIZE[config.dtype] // ITEMSIZE[dtype]
    check(capacity(), weights, config.num_ranks)


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


def stored_bytes(model_dir: Path) -> int:
    """Of a checkpoint's weights; 0 if it does not say so."""
    single, index = model_dir / "model.safetensors", model_dir / INDEX
    try:
        if single.exists():
            return single.stat().st_size
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
