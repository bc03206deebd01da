"""The traces of the out-of-memory killer, from files as the kernel writes them."""

from pathlib import Path

import pytest

from revivemoe.cluster.oom import RECENT_S, OomKiller, cgroup_counters, count_of

EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 7\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
VMSTAT = "nr_free_pages 1024\noom_kill {}\nnuma_hit 5\n"


@pytest.mark.parametrize("text", [EVENTS, CONTROL, VMSTAT])
def test_the_count_is_found_in_each_file(text: str) -> None:
    assert count_of(text.format(42)) == 42


@pytest.mark.parametrize(
    "text", ["", "oom_group_kill 7\n", "oom_kill\n", "oom_kill many\n", "\x00"]
)
def test_what_is_no_count_is_none(text: str) -> None:
    assert count_of(text) is None


def test_where_the_counters_of_the_own_cgroups_are() -> None:
    cgroups = "9:name=systemd:/\n4:cpu,memory:/pod/7\n3:cpuset:/\n0::/pod/8\n"
    found = [str(path) for path in cgroup_counters(cgroups, Path("/m"))]
    assert found == [
        "/m/memory/pod/7/memory.oom_control",
        "/m/memory/memory.oom_control",
        "/m/pod/8/memory.events",
        "/m/memory.events",
        "/m/unified/pod/8/memory.events",
        "/m/unified/memory.events",
    ]
    assert cgroup_counters("", Path("/m")) == []


def test_it_has_struck_once_a_count_has_grown(tmp_path: Path) -> None:
    events, vmstat = tmp_path / "memory.events", tmp_path / "vmstat"
    events.write_text(EVENTS.format(5))
    vmstat.write_text(VMSTAT.format(9))
    killer = OomKiller([events, vmstat])
    assert not killer.struck(0.0)
    events.write_text(EVENTS.format(6))
    assert killer.struck(1.0)
    assert killer.struck(1.0 + RECENT_S), "it may have ended several at once"
    assert not killer.struck(1.1 + RECENT_S)
    vmstat.write_text(VMSTAT.format(10))
    assert killer.struck(9.0)


def test_files_that_come_go_or_cannot_be_read_are_no_evidence(tmp_path: Path) -> None:
    late = tmp_path / "late"
    killer = OomKiller([late, tmp_path / "never", tmp_path])
    assert not killer.struck(0.0)
    late.write_text(EVENTS.format(5))
    assert not killer.struck(0.0)
    late.unlink()
    assert not killer.struck(0.0)
