"""What rounds say together, and who disturbed them."""

import os
from dataclasses import replace

import pytest

from revivemoe.bench.loadgen import StreamResult
from revivemoe.bench.peers.machine import Reading, foreign_cores, tree_cpu_s, tree_pss_mb
from revivemoe.bench.peers.rounds import Round, of_streams, summarise

ONE = Round("a", 4, 100.0, 0.5, 0.9, 0.05, 0.08, 0.01, 300.0, 0.02)


def result(started: float, *times: float) -> StreamResult:
    return StreamResult(token_ids=[1] * len(times), times=list(times), started=started)


def test_a_round() -> None:
    results = [result(1.0, 1.5, 2.0, 3.0), result(1.0, 1.7, 2.1, 2.2)]
    one = of_streams("a", results, cpu_s=1.2, pss_mb=10.0, foreign=0.0)
    assert one.streams == 2
    assert one.tokens_per_s == pytest.approx(6 / 2.0)
    assert (one.ttft_s, one.ttft_worst_s) == (pytest.approx(0.6), pytest.approx(0.7))
    assert one.gap_s == pytest.approx(0.45)
    assert one.cpu_per_token_s == pytest.approx(0.2)


def test_disturbed_rounds_do_not_count() -> None:
    slow = replace(ONE, tokens_per_s=20.0, foreign_cores=0.5)
    (summary,) = summarise([ONE, slow, replace(ONE, tokens_per_s=110.0)])
    assert (summary.counted, summary.rounds) == (2, 3)
    assert (summary.tokens_per_s, summary.least, summary.most) == (105.0, 100.0, 110.0)


def test_where_all_are_disturbed_they_are_shown_and_none_is_counted() -> None:
    (summary,) = summarise([replace(ONE, foreign_cores=0.5)])
    assert (summary.counted, summary.tokens_per_s) == (0, 100.0)


def test_systems_stand_beside_each_other_by_number_of_streams() -> None:
    rounds = [replace(ONE, system=s, streams=n) for s in ("a", "b") for n in (4, 1)]
    assert [(s.streams, s.system) for s in summarise(rounds)] == [
        (1, "a"), (1, "b"), (4, "a"), (4, "b"),
    ]  # fmt: skip


def test_foreign_is_what_neither_server_nor_client_did() -> None:
    before = Reading(at=0.0, busy_s=10.0, own_s=2.0, client_s=1.0)
    after = Reading(at=2.0, busy_s=13.0, own_s=4.0, client_s=1.5)
    assert foreign_cores(before, after) == pytest.approx(0.25)


def test_what_a_process_uses_is_read_from_the_kernel() -> None:
    assert tree_cpu_s(os.getpid()) > 0
    assert tree_pss_mb(os.getpid()) > 10
