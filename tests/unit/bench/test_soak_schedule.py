"""Which faults a soak brings about: of every kind, seeded, and never what nobody could survive."""

import random
from dataclasses import replace
from itertools import islice

import pytest

from revivemoe.bench.soak.kinds import Kind, kinds
from revivemoe.bench.soak.layouts import COLLOCATED, DISAGGREGATED, Layout, layouts
from revivemoe.bench.soak.schedule import Fault, schedule
from revivemoe.serving.injection import INJECTABLE, parse_injection

LAYOUTS = [replace(one, backend=b) for one in (COLLOCATED, DISAGGREGATED) for b in ("shm", "gloo")]
named = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: f"{one.name}-{one.backend}")


def faults(layout: Layout, count: int, seed: int = 0) -> list[Fault]:
    return list(islice(schedule(random.Random(seed), layout, (10, 20)), count))


@named
def test_every_kind_comes_before_any_comes_again(layout: Layout) -> None:
    names = {kind.name for kind in kinds(layout)}
    found = [fault.kind.name for fault in faults(layout, 2 * len(names))]
    assert len(names) == len(kinds(layout)), "names are unique"
    assert set(found[: len(names)]) == names
    assert set(found[len(names) :]) == names


@named
def test_everything_that_can_be_injected_is(layout: Layout) -> None:
    injected = {kind.what for kind in kinds(layout) if kind.how == "inject"}
    links = set() if layout.backend == "gloo" else {"comm"}
    assert injected == set(INJECTABLE) - links


def test_a_seed_says_all() -> None:
    assert faults(COLLOCATED, 50, 7) == faults(COLLOCATED, 50, 7)
    assert faults(COLLOCATED, 50, 7) != faults(COLLOCATED, 50, 8)


@named
def test_nobody_loses_a_whole_role_unless_all_are_meant(layout: Layout) -> None:
    for fault in faults(layout, 500):
        assert len(set(fault.ranks)) == len(fault.ranks) == fault.kind.ranks
        left = set(layout.ranks) - set(fault.ranks)
        assert left & {*layout.attention_ranks} or fault.kind.how == "all", fault
        assert left & {*layout.expert_ranks} or fault.kind.how == "all", fault
        assert 10 <= fault.wait_s <= 20
        assert 0 <= fault.delay_s <= fault.kind.within_s


@named
def test_numbers_are_spoilt_where_they_are_made(layout: Layout) -> None:
    for fault in faults(layout, 500):
        if fault.kind.what == "nan":
            makers = layout.expert_ranks if fault.phase == "experts" else layout.attention_ranks
            assert fault.ranks[0] in makers


@named
def test_the_server_takes_every_injection(layout: Layout) -> None:
    for fault in faults(layout, 200):
        if fault.kind.how == "inject":
            at = {} if fault.phase is None else {"phase": fault.phase}
            asked = {"kind": fault.kind.what, "at": at, "params": dict(fault.kind.params)}
            parse_injection(asked, "1")


def test_a_fault_has_a_name() -> None:
    kill, error = Kind("kill", "kill", ranks=2), Kind("error", "inject", what="error")
    assert Fault(kill, (1, 3), 0.0).name == "kill of rank 1 and 3"
    assert Fault(error, (2,), 0.0, phase="sample").name == "error in sample of rank 2"
    assert Fault(Kind("pause", "pause"), (2,), 0.0).name == "pause"


def test_the_layouts_of_a_name() -> None:
    assert list(layouts("both")) == [COLLOCATED, DISAGGREGATED]
    assert list(layouts("collocated")) == [COLLOCATED]


def test_the_flags_of_a_layout(tmp_path: object) -> None:
    flags = DISAGGREGATED.flags(16, tmp_path)  # type: ignore[arg-type]
    pairs = dict(zip(flags[::2], flags[1::2], strict=False))
    assert pairs["--data-parallel-size"] == "3"
    assert pairs["--expert-ranks"] == "2"
    assert pairs["--redundant-experts"] == "16"
