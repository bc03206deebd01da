"""How many KV blocks a rank takes, and when it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from unit.rank_specs import LIMITS, SPEC

from revivemoe.executor import kv_size
from revivemoe.executor.kv_size import MIB, OutOfMemoryForKV, num_kv_blocks
from revivemoe.executor.spec import InstanceSize
from revivemoe.host.memory import Limit


class Generator:
    def num_bytes(self) -> int:
        return 100 * MIB


class Runner:
    """A model whose blocks take a MiB each."""

    generator = Generator()

    def kv_bytes_per_block(self, block_size: int) -> int:
        assert block_size == 16
        return MIB


def num_blocks(
    monkeypatch: pytest.MonkeyPatch, free_mib: int, limit_mib: int | None = None, **fields: Any
) -> int:
    path = Path("/proc/meminfo" if limit_mib is None else "/group/memory.max")
    limit = Limit(path, (1 << 20 if limit_mib is None else limit_mib) * MIB, 0)
    monkeypatch.setattr(kv_size, "free_bytes", lambda: free_mib * MIB)
    monkeypatch.setattr(kv_size, "capacity", lambda: limit)
    monkeypatch.setattr(kv_size, "expert_bytes", lambda model_dir, dtype: MIB)
    return num_kv_blocks(msgspec.structs.replace(SPEC, **fields), Runner())  # type: ignore[arg-type]


def test_as_many_as_can_ever_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(monkeypatch, 1000) == 20


def test_as_many_as_its_share_of_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(monkeypatch, 60) == 15


def test_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(monkeypatch, 60, num_kv_blocks=50) == 50


@pytest.mark.parametrize(
    ("free_mib", "fields", "says"),
    [
        (36, {}, "9 blocks of 16 tokens"),
        (1000, {"limits": replace(LIMITS, max_model_len=1 << 30)}, "lower --max-model-len"),
        (1000, {"num_kv_blocks": 9}, "raise --num-kv-blocks"),
        (
            1000,
            {"num_kv_blocks": 10**9},
            "1000 MiB are free (/proc/meminfo is 1048576 MiB)",
        ),
    ],
)
def test_too_little(
    monkeypatch: pytest.MonkeyPatch, free_mib: int, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(OutOfMemoryForKV, match="KV cache of rank 3") as raised:
        num_blocks(monkeypatch, free_mib, **fields)
    assert says in str(raised.value)


INSTANCE = InstanceSize(num_ranks=4, attention_ranks=2, expert_slots=64)
TAKEN_MIB = 512 + 4 * 64 + 2 * 100 + 64


def test_what_the_others_are_about_to_load_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is free now, in a group in which little has been loaded so far."""
    small, large = TAKEN_MIB + 60, TAKEN_MIB + 1000
    assert num_blocks(monkeypatch, 1000, small, instance=INSTANCE) == 15
    assert num_blocks(monkeypatch, 1000, large, instance=INSTANCE) == 20
    assert num_blocks(monkeypatch, 60, large, instance=INSTANCE) == 15, "others are in the group"


def test_a_limit_that_is_too_low_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemoryForKV, match=r"/group/memory.max is 500 MiB") as raised:
        num_blocks(monkeypatch, 1000, 500, instance=INSTANCE)
    assert "0 MiB are free for the caches of all ranks" in str(raised.value)


def test_as_many_as_asked_for_must_fit_in_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank found room for its own, and the pages of both were written."""
    limit = TAKEN_MIB + 40
    assert num_blocks(monkeypatch, 1000, limit, instance=INSTANCE, num_kv_blocks=20) == 20
    assert num_blocks(monkeypatch, 20, limit, instance=INSTANCE, num_kv_blocks=20) == 20, "back"
    with pytest.raises(OutOfMemoryForKV, match=r"19 MiB are free \(/group/memory.max"):
        num_blocks(monkeypatch, 19, limit, instance=INSTANCE, num_kv_blocks=20)
    with pytest.raises(OutOfMemoryForKV, match=r"21 MiB in each of 2 ranks, .* are 40 MiB"):
        num_blocks(monkeypatch, 1000, limit, instance=INSTANCE, num_kv_blocks=21)


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_size.torch.cuda, "mem_get_info", lambda device: (60 * MIB, 1 << 40))
    assert num_blocks(monkeypatch, 0, 1, instance=INSTANCE, device="cuda:0") == 15
