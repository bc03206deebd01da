"""Experts in host memory: what one process puts there another gets, whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cache_rows import EXPERTS, LAYERS, SHAPES, rows_of, same
from support.solo import SoloRank
from support.warm import Zygote

from revivemoe.checkpoint import ARCHS
from revivemoe.core.limits import RankLimits
from revivemoe.ids import ExpertId, LayerId, SlotId
from revivemoe.messages.commands import SlotLoad
from revivemoe.model.host_cache import HostCache, create_host_cache, expert_bytes

BYTES = 5 * 3 * 2 + 3 * 7 * 4 + 6 * 2
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_host_cache(LAYERS, EXPERTS, BYTES)
    yield made
    os.close(made)


def test_each_expert_has_a_place_of_its_own(fd: int) -> None:
    cache = HostCache(fd, SHAPES)
    everything = [(layer, ExpertId(e)) for layer in LAYERS for e in range(EXPERTS)]
    for layer, expert in everything:
        assert cache.fetch(layer, expert) is None
        cache.put(layer, expert, rows_of(layer, expert))
    for layer, expert in everything:
        got = cache.fetch(layer, expert)
        assert got is not None
        assert same(got, rows_of(layer, expert))


def test_what_is_there_is_not_written_again(fd: int) -> None:
    """A reader may be copying it."""
    cache = HostCache(fd, SHAPES)
    cache.put(LAYERS[1], ExpertId(2), rows_of(2, 2))
    cache.put(LAYERS[1], ExpertId(2), rows_of(9, 9))
    got = cache.fetch(LAYERS[1], ExpertId(2))
    assert got is not None
    assert same(got, rows_of(2, 2))


def test_a_row_cut_short_is_not_there(fd: int) -> None:
    """As when the process that writes it dies: the last parameter never comes."""
    cache, rows = HostCache(fd, SHAPES), rows_of(1, 3)

    class Dies(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            if name == "down":
                raise KeyboardInterrupt
            return super().__getitem__(name)

    with pytest.raises(KeyboardInterrupt):
        cache.put(LAYERS[0], ExpertId(3), Dies(rows))
    assert cache.fetch(LAYERS[0], ExpertId(3)) is None
    cache.put(LAYERS[0], ExpertId(3), rows)
    got = cache.fetch(LAYERS[0], ExpertId(3))
    assert got is not None
    assert same(got, rows)


def test_it_costs_memory_only_where_it_is_written() -> None:
    fd = create_host_cache(LAYERS, 64, 1 << 24)
    try:
        assert os.fstat(fd).st_size > 3 << 30
        shapes: Any = {"up": ((1 << 22,), torch.float32)}
        cache = HostCache(fd, shapes)
        assert cache.fetch(LAYERS[2], ExpertId(63)) is None
        cache.put(LAYERS[2], ExpertId(63), {"up": torch.ones(1 << 22)})
        assert os.fstat(fd).st_blocks * 512 < 20 << 20
    finally:
        os.close(fd)


def test_shapes_that_do_not_fit(fd: int) -> None:
    with pytest.raises(ValueError, match="takes 448 bytes, and the cache's rows have 128"):
        HostCache(fd, {"up": ((112,), torch.float32)})
    with pytest.raises(AssertionError, match="up"):
        HostCache(fd, SHAPES).put(LAYERS[0], ExpertId(0), rows_of(1, 0) | {"up": torch.zeros(7, 3)})
    assert HostCache(fd, SHAPES).fetch(LAYERS[0], ExpertId(0)) is None


def test_a_descriptor_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(bytes(100))
    with path.open("rb") as file, pytest.raises(ValueError, match="not a cache"):
        HostCache(file.fileno(), SHAPES)


def test_a_machine_with_weak_store_order(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="aarch64"):
        HostCache(fd, SHAPES)


OTHER = """
import sys
sys.path.insert(0, sys.argv[2])
from host_cache_rows import other_process

print(other_process(int(sys.argv[1])))
"""


def test_another_process_gets_it_and_puts_its_own(fd: int, warm: Zygote) -> None:
    cache = HostCache(fd, SHAPES)
    cache.put(LAYERS[0], ExpertId(4), rows_of(1, 4))
    assert warm.run(OTHER, str(fd), str(Path(__file__).parent), fds=[fd]) == "True\n"
    got = cache.fetch(LAYERS[2], ExpertId(5))
    assert got is not None
    assert same(got, rows_of(5, 5))


# ---- a rank's experts -----------------------------------------------------------------------


def cache_for(solo: SoloRank, path: Path) -> int:
    fd = create_host_cache(list(solo.runner.exchange.layers), 16, expert_bytes(path, torch.float32))
    solo.runner.worker.attach_host_cache(fd)
    return fd


@pytest.mark.parametrize("arch", ARCHS)
def test_an_expert_comes_back_from_host_memory(made: dict[str, Path], arch: str) -> None:
    """One rank fills it, another, without these experts, loads from it without the disk."""
    holder, needy = SoloRank(made[arch], LIMITS), SoloRank(made[arch], LIMITS, {3: {2, 5}})
    fd = cache_for(holder, made[arch])
    assert holder.runner.worker.fill_host_cache() == 16 * len(holder.runner.exchange.layers)
    needy.runner.worker.attach_host_cache(fd)
    loads = [SlotLoad(LayerId(3), SlotId(s), ExpertId(s)) for s in (2, 5)]
    report = needy.runner.worker.load(loads)
    assert report.sources == {"host": 2}
    for slot in range(16):
        ours, theirs = (
            solo.runner.exchange.layers[LayerId(3)].read_slot(SlotId(slot))
            for solo in (needy, holder)
        )
        assert same(ours, theirs)
    os.close(fd)


def test_what_came_from_disk_is_kept(made: dict[str, Path]) -> None:
    path = made["qwen3_moe"]
    solo = SoloRank(path, LIMITS, {3: {2}})
    fd = cache_for(solo, path)
    again = [SlotLoad(LayerId(3), SlotId(2), ExpertId(2))]
    assert solo.runner.worker.load(again).sources == {"disk": 1}
    assert solo.runner.worker.load(again).sources == {"host": 1}
    os.close(fd)


def test_a_peer_is_asked_before_host_memory(made: dict[str, Path]) -> None:
    path = made["qwen3_moe"]
    solo = SoloRank(path, LIMITS)
    fd = cache_for(solo, path)
    solo.runner.worker.fill_host_cache()

    class Peer:
        name = "peer"

        def fetch(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
            shapes = solo.runner.worker.row_shapes().items()
            return {n: torch.ones(s) for n, (s, _) in shapes} if expert == 2 else None

    loads = [SlotLoad(LayerId(3), SlotId(s), ExpertId(s)) for s in (2, 5)]
    assert solo.runner.worker.load(loads, [Peer()]).sources == {"peer": 1, "host": 1}
    os.close(fd)


def test_empty_slots_are_not_cached(made: dict[str, Path]) -> None:
    path = made["qwen3_moe"]
    solo = SoloRank(path, LIMITS, {3: {2}, 1: {0, 1}})
    fd = cache_for(solo, path)
    assert solo.runner.worker.fill_host_cache() == 4 * 16 - 3
    cache = HostCache(fd, solo.runner.worker.row_shapes())
    assert cache.fetch(LayerId(3), ExpertId(2)) is None
    assert cache.fetch(LayerId(3), ExpertId(3)) is not None
    os.close(fd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_of_an_expert(made: dict[str, Path], arch: str, dtype: torch.dtype) -> None:
    assert expert_bytes(made[arch], dtype) == 3 * 64 * 32 * dtype.itemsize
