"""A model that memory cannot hold is refused before it is loaded."""

from pathlib import Path

import pytest

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.config import EngineConfig, resolve
from revivemoe.host.memory import Limit
from revivemoe.serving.memory import MIB, check, weight_bytes

GROUP = Path("/sys/fs/cgroup/memory.max")
PROCESSES = 512 + 2 * 64


def test_weights_and_processes_must_fit() -> None:
    fits, least = (PROCESSES + 101) * MIB, (PROCESSES + 100) * MIB
    check(Limit(GROUP, fits, fits), 0, 100 * MIB, 2)
    with pytest.raises(ValueError, match=r"^740 MiB of memory \(/sys/fs/cgroup/"):
        check(Limit(GROUP, least, least), 0, 100 * MIB, 2)


def test_what_others_have_taken_is_not_to_be_had() -> None:
    fits = (PROCESSES + 101) * MIB
    check(Limit(GROUP, 4096 * MIB, fits - 300 * MIB), 300 * MIB, 100 * MIB, 2)
    with pytest.raises(ValueError, match=r"4096 MiB of memory .* of which 441 MiB can be had now"):
        check(Limit(GROUP, 4096 * MIB, fits - 300 * MIB), 0, 100 * MIB, 2)


@pytest.mark.parametrize(
    ("flags", "attention", "slots", "dense"),
    [
        ({}, 1, 16, 1),
        ({"data_parallel_size": 4}, 4, 16, 4),
        ({"data_parallel_size": 4, "redundant_experts": 16, "spare_expert_slots": 1}, 4, 36, 4),
        ({"data_parallel_size": 2, "expert_ranks": 3, "spare_expert_slots": 1}, 2, 19, 2),
        ({"data_parallel_size": 4, "expert_host_cache": True}, 4, 32, 4),
        ({"data_parallel_size": 4, "dense_ffn_tp": 2}, 4, 16, 2),
    ],
)
def test_what_all_ranks_load(
    made: dict[str, Path], flags: dict[str, int], attention: int, slots: int, dense: int
) -> None:
    """Every attention rank holds all but the experts."""
    info = inspect_checkpoint(made["deepseek_v3"])
    config = resolve(EngineConfig(info.model_dir, dtype="float32", **flags), info)  # type: ignore[arg-type]
    shared = 4 * 3 * info.hidden_size * info.dense_width
    expert = 4 * 3 * info.hidden_size * 32 * len(info.moe_layers)
    rest = 4 * info.num_parameters - 16 * expert - shared
    assert rest > shared > 0
    assert weight_bytes(config, info) == attention * rest + slots * expert + dense * shared
