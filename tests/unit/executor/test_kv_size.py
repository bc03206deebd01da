"""How many KV blocks a rank takes, and when it refuses."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from unit.rank_specs import LIMITS, SPEC

from revivemoe.executor import main
from revivemoe.executor.main import OutOfMemoryForKV, _num_blocks

MIB = 2**20


class Runner:
    """A model whose blocks take a MiB each."""

    def kv_bytes_per_block(self, block_size: int) -> int:
        assert block_size == 16
        return MIB


def num_blocks(monkeypatch: pytest.MonkeyPatch, free_mib: int, **fields: Any) -> int:
    monkeypatch.setattr(main, "_free_bytes", lambda device: free_mib * MIB)
    return _num_blocks(msgspec.structs.replace(SPEC, **fields), Runner())  # type: ignore[arg-type]


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
        (1000, {"num_kv_blocks": 10**9}, "1000 MiB are free: lower --num-kv-blocks"),
    ],
)
def test_too_little(
    monkeypatch: pytest.MonkeyPatch, free_mib: int, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(OutOfMemoryForKV, match="KV cache of rank 3") as raised:
        num_blocks(monkeypatch, free_mib, **fields)
    assert says in str(raised.value)
