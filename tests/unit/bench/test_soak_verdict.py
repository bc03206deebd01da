"""What a soak makes of what it has seen: growth, wrong streams, what an instance lacks, tables."""

from typing import Any

import pytest
from rich.console import Console

from revivemoe.bench.loadgen import StreamResult
from revivemoe.bench.soak import report
from revivemoe.bench.soak.consequences import came, member, unprovoked
from revivemoe.bench.soak.episode import Episode
from revivemoe.bench.soak.instance import lacks, misplaced, rank_pids, shape
from revivemoe.bench.soak.kinds import Consequence, Kind
from revivemoe.bench.soak.load import difference, longest_silence_s
from revivemoe.bench.soak.resources import Sample, Usage, begin_and_end, growths, summed
from revivemoe.bench.soak.schedule import Fault
from revivemoe.bench.soak.soak import Soaked

CALM = Usage(rss_mb=400, shared_mb=10, descriptors=40, threads=8)


def sample(usage: Usage) -> Sample:
    return {"engine": usage, "a rank": CALM}


# ---- resources ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (CALM, []),
        (Usage(470, 10, 40, 8), []),
        (Usage(481, 10, 40, 8), ["rss_mb of engine grew from 400 to 481"]),
        (Usage(400, 39, 40, 8), []),
        (Usage(400, 41, 40, 8), ["shared_mb of engine grew from 10 to 41"]),
        (Usage(400, 10, 50, 13), []),
        (
            Usage(400, 10, 51, 14),
            ["descriptors of engine grew from 40 to 51", "threads of engine grew from 8 to 14"],
        ),
        (Usage(200, 0, 10, 1), []),
    ],
)
def test_growth_beyond_both_bounds_is_told(end: Usage, told: list[str]) -> None:
    assert growths(sample(CALM), sample(end)) == told


def test_begin_and_end_are_medians_of_the_outer_fifths() -> None:
    spikes = [Usage(rss, 0, 0, 0) for rss in (1, 2, 999, 50, 50, 50, 50, 50, 50, 50, 50, 50)]
    ends = [Usage(rss, 0, 0, 0) for rss in (7, 8, 999)]
    begin, end = begin_and_end([{"engine": usage} for usage in (*spikes, *ends)])
    assert begin["engine"].rss_mb == 2
    assert end["engine"].rss_mb == 8


def test_too_few_samples_say_nothing() -> None:
    assert growths(*begin_and_end([sample(CALM)] * 14)) == []
    assert begin_and_end([]) == ({}, {})


def test_the_sum_of_all() -> None:
    assert summed([CALM, CALM]) == Usage(800, 20, 80, 16)


# ---- streams --------------------------------------------------------------------------------


def result(tokens: list[int], finish_reason: str = "length") -> StreamResult:
    return StreamResult(token_ids=tokens, finish_reason=finish_reason, request_id="r1")


def test_where_a_stream_departs() -> None:
    assert difference([1, 2, 3], result([1, 2, 3])) == ""
    assert "ended by stop" in difference([1, 2, 3], result([1, 2, 3], "stop"))
    assert "from token 1 on, of 3: [9, 3], not [2, 3]" in difference([1, 2, 3], result([1, 9, 3]))
    assert "from token 2 on, of 2: [], not [3]" in difference([1, 2, 3], result([1, 2]))
    assert "from token 2 on, of 3: [3], not []" in difference([1, 2], result([1, 2, 3]))


def test_silence_counts_before_the_first_token_too() -> None:
    assert longest_silence_s(StreamResult(started=10.0, times=[13.0, 14.0])) == 3.0
    assert longest_silence_s(StreamResult(started=10.0)) == 0.0


# ---- the instance ---------------------------------------------------------------------------


def status(state: str = "serving", missing: Any = (), epoch: int = 3, **rank_1: Any) -> Any:
    fixed = {"status": "healthy", "roles": ["attention"], "incarnation": 1}
    ranks = [{"id": i, "logical_rank": i, "pid": 10 + i, **fixed} for i in range(2)]
    ranks[1] |= rank_1
    return {
        "state": state,
        "epoch": epoch,
        "quality": "full",
        "engines": ranks,
        "experts": {"missing": list(missing)},
        "recoveries": [],
    }


def test_what_an_instance_lacks() -> None:
    well = shape(status())
    assert lacks(status(), well) == ""
    assert lacks(status("recovering"), well) == "the instance is recovering"
    assert lacks(status(status="dead"), well) == "rank 1 is dead"
    assert lacks(status(logical_rank=None), well) == "rank 1 is healthy but no member"
    assert "missing" in lacks(status(missing=[[0, 3]]), well)
    switched = status(roles=["expert"])
    assert lacks(switched, well) == "rank 1 is expert 1, was attention 1"
    assert misplaced(switched, well) == [1]
    assert misplaced(status(), well) == []


def test_processes_of_those_that_live() -> None:
    assert rank_pids(status()) == {0: 10, 1: 11}
    assert rank_pids(status(status="dead")) == {0: 10}
    assert rank_pids(status(status="joining", pid=None)) == {0: 10}


@pytest.mark.parametrize(
    ("consequence", "after", "there"),
    [
        ("lost", status(), False),
        ("lost", status(epoch=4), False),
        ("lost", status(epoch=4, status="dead"), True),
        ("lost", status("recovering", epoch=4, status="dead"), False),
        ("lost", status(epoch=3, status="dead"), False),
        ("lost", status(epoch=5, incarnation=2), True),
        ("epoch", status(), False),
        ("epoch", status("paused", epoch=4), False),
        ("epoch", status(epoch=4), True),
        ("nothing", status(), True),
        ("nothing", status("recovering"), False),
    ],
)
def test_whether_a_fault_has_come_to_something(
    consequence: Consequence, after: Any, there: bool
) -> None:
    fault = Fault(Kind("a fault", "kill", consequence), (1,), 0.0)
    assert came(fault, status(), after) == there


def test_who_takes_part() -> None:
    assert member(1, status())
    assert member(1, status(status="suspect"))
    assert not member(1, status(status="joining"))
    assert not member(1, status(status="healthy", logical_rank=None))
    assert not member(1, status("recovering"))


def test_who_was_accused_without_cause() -> None:
    document = status()
    fault = {"id": 1, "kind": "hang", "detail": "in attention"}
    document["recoveries"] = [{"epoch": 3, "faults": [fault]}, {"epoch": 4, "faults": [fault]}]
    assert unprovoked(document, 3, (0,)) == ["rank 1: hang: in attention"]
    assert unprovoked(document, 3, (1,)) == []
    assert unprovoked(document, 4, (0,)) == []


# ---- what is told ---------------------------------------------------------------------------


def soaked() -> Soaked:
    one = Soaked("collocated", seconds=90.0)
    one.episodes = [
        Episode("kill", "kill of rank 1", 0.2, 2.0, 1, ()),
        Episode("kill", "kill of rank 2", 0.4, 4.0, 0, ()),
        Episode("pause", "pause", 1.0, 1.5, 0, ("rank 3: hang: in sample",)),
    ]
    one.samples = [sample(CALM)] * 15
    one.tally.done = 70
    return one


def shown(one: Soaked, interrupted: bool = False) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        report.show(console, [one], interrupted)
    return capture.get()


def test_the_tables() -> None:
    text = shown(soaked())
    assert "0.30 / 0.40" in text
    assert "3.00 / 4.00" in text
    assert "400 / 400" in text
    assert "3 faults in 1.5 minutes" in text
    assert "70 requests" in text
    assert "nobody had touched it: rank 3: hang" in text
    assert text.splitlines()[-1] == "all is well"
    assert shown(soaked(), True).splitlines()[-1] == "interrupted; so far: all is well"


def test_each_violation_is_a_line_with_what_was_under_way() -> None:
    one = soaked()
    one.violations.during = "kill of rank 2"
    one.violations.add("stream 7\nfailed")
    (line,) = [line for line in shown(one).splitlines() if line.startswith("violated")]
    assert "collocated" in line
    assert "stream 7 failed (latest: kill of rank 2)" in line
    assert "1 violations" in shown(one)


def test_the_document() -> None:
    document: Any = report.document([soaked()], {"seed": 7}, interrupted=True)
    assert document["violations"] == []
    assert document["interrupted"]
    (layout,) = document["layouts"]
    assert layout["requests"]["done"] == 70
    assert layout["faults"][0]["kind"] == "kill"
    assert layout["end"]["engine"]["threads"] == 8
