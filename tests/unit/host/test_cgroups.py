"""Limits from trees of control groups as the kernel shows them, v1 and v2, whole and in part."""

from pathlib import Path

import pytest

from revivemoe.host import cores, memory
from revivemoe.host.cgroups import places
from revivemoe.host.memory import FILES, limits, reclaimable

GIB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712\n"
V2, V1 = "0::/pod/box\n", "9:cpu,cpuacct:/pod/box\n4:memory:/pod/box\n0::/\n"
STAT_V2 = f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\nfile_mapped {GIB // 2}\n"


def tree(root: Path, **groups: dict[str, object]) -> Path:
    """Files by group; `_` stands for the root, `__` for a slash."""
    for name, files in groups.items():
        group = root / name.strip("_").replace("__", "/")
        group.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (group / file.replace("_", ".", 1)).write_text(f"{text}")
    return root


def found(text: str, mount: Path) -> list[tuple[int, int]]:
    return [(limit.total, limit.free) for limit in limits(places(text, "memory", mount))]


def test_v2_every_group_along_the_path_counts(tmp_path: Path) -> None:
    tree(
        tmp_path,
        pod={"memory_max": 3 * GIB, "memory_current": 2 * GIB},
        pod__box={"memory_max": "max", "memory_high": 8 * GIB, "memory_current": GIB},
    )
    assert found(V2, tmp_path) == [(8 * GIB, 7 * GIB), (3 * GIB, GIB)]
    assert str(limits(places(V2, "memory", tmp_path))[0].path).endswith("/pod/box/memory.high")


def test_v1_and_its_word_for_no_limit(tmp_path: Path) -> None:
    used = {"memory_usage_in_bytes": GIB}
    tree(
        tmp_path,
        memory={"memory_limit_in_bytes": NO_LIMIT_V1, **used},
        memory__pod={"memory_limit_in_bytes": 2 * GIB, **used},
        memory__pod__box={"memory_limit_in_bytes": NO_LIMIT_V1, **used},
    )
    assert found(V1, tmp_path) == [(2 * GIB, GIB)]


def test_page_cache_that_nobody_has_mapped_is_free(tmp_path: Path) -> None:
    full = {"memory_max": 4 * GIB, "memory_current": 4 * GIB, "memory_stat": STAT_V2}
    assert found(V2, tree(tmp_path, pod__box=full)) == [(4 * GIB, 3 * GIB // 2)]
    v1 = "cache 9\ntotal_inactive_file 700\ntotal_active_file 300\ntotal_mapped_file 400\n"
    assert reclaimable(v1, FILES[1]) == 600
    assert reclaimable("inactive_file 5\nfile_mapped 9\n", FILES[2]) == 0
    assert reclaimable("", FILES[2]) == 0


def test_a_group_over_its_limit_has_nothing(tmp_path: Path) -> None:
    over = {"memory_max": GIB, "memory_current": 2 * GIB}
    assert found(V2, tree(tmp_path, pod__box=over)) == [(GIB, 0)]


def test_in_a_container_the_root_is_the_own_group(tmp_path: Path) -> None:
    tree(tmp_path, _={"memory_max": GIB, "memory_current": 0})
    for text in ("0::/\n", "0::/host/name/of/it\n", "0::/../beside\n"):
        assert found(text, tmp_path) == [(GIB, GIB)], text


@pytest.mark.parametrize("text", ["", "3:cpuset:/\n0::/nowhere\n"])
def test_without_limits_the_host_alone_counts(tmp_path: Path, text: str) -> None:
    assert found(text, tmp_path) == []
    assert cores.quotas(places(text, "cpu", tmp_path)) == []


def test_a_limit_without_a_usage_is_none(tmp_path: Path) -> None:
    assert found(V2, tree(tmp_path, pod__box={"memory_max": GIB})) == []


def test_what_this_machine_says_can_be_read() -> None:
    assert memory.free_bytes() > 0
    assert memory.capacity().total > 0
    assert cores.usable_cores() >= 1


def test_quotas_of_v1_and_v2(tmp_path: Path) -> None:
    tree(
        tmp_path,
        pod={"cpu_max": "50000 100000\n"},
        pod__box={"cpu_max": "max 100000\n"},
        cpu__pod={"cpu_cfs_quota_us": -1, "cpu_cfs_period_us": 100000},
        cpu__pod__box={"cpu_cfs_quota_us": 250000, "cpu_cfs_period_us": 100000},
    )
    assert cores.quotas(places(V2, "cpu", tmp_path)) == [0.5]
    assert cores.quotas(places(V1, "cpu", tmp_path)) == [2.5]


@pytest.mark.parametrize(
    ("quotas", "affinity", "usable"),
    [([], 4, 4), ([0.5], 4, 1), ([1.5], 4, 2), ([8.0, 3.0], 4, 3), ([64.0], 2, 2)],
)
def test_the_least_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quotas: list[float], affinity: int, usable: int
) -> None:
    monkeypatch.setattr(cores, "quotas", lambda places: quotas)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(affinity)))
    assert cores.usable_cores() == usable
