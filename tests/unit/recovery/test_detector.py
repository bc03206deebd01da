from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import Activity, Heartbeat, RankStats
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import ISOLATE, Fault
from revivemoe.recovery.policy import Policy

A, B = RankId(0), RankId(1)
FIRST, SECOND = Incarnation(1), Incarnation(2)


def running() -> Detector:
    detector = Detector(Policy(suspect_after_s=1.0, accuse_after_s=1.5))
    detector.launched(A, FIRST, 10.0)
    detector.launched(B, FIRST, 10.0)
    return detector


def test_an_exit_accuses_and_dates_from_the_last_word() -> None:
    detector = running()
    detector.heard(A, FIRST, 11.0)
    fault = detector.exited(A, FIRST, "process 7 exited", 11.25)
    assert fault == Fault(A, "process_exit", "process 7 exited", ISOLATE, detect_s=0.25)


def test_an_exit_accuses_once() -> None:
    detector = running()
    assert detector.exited(A, FIRST, "", 11.0) is not None
    assert detector.exited(A, FIRST, "", 12.0) is None


def test_a_former_process_accuses_nobody() -> None:
    detector = running()
    detector.launched(A, SECOND, 20.0)
    assert detector.exited(A, FIRST, "", 21.0) is None
    assert detector.exited(A, SECOND, "", 21.0) is not None


def test_a_stranger_accuses_nobody() -> None:
    assert Detector().exited(A, FIRST, "", 0.0) is None


def test_silence_makes_suspect_and_no_more() -> None:
    detector = running()
    assert not detector.suspect(A, 99.0), "it has not said anything yet: it may be loading"
    detector.heard(B, FIRST, 10.0)
    detector.heard(A, FIRST, 10.5)
    assert not detector.suspect(A, 11.5)
    assert detector.suspect(A, 11.51)
    assert detector.suspect(B, 11.5)
    detector.heard(B, FIRST, 11.5)
    assert not detector.suspect(B, 11.5)


def test_age() -> None:
    detector = running()
    assert detector.age_s(A, 12.5) == 2.5
    assert detector.age_s(A, 9.0) == 0.0
    assert detector.age_s(RankId(7), 9.0) is None
    assert not detector.suspect(RankId(7), 99.0)


def test_what_a_former_process_or_a_corpse_says_is_no_evidence() -> None:
    detector = running()
    detector.launched(A, SECOND, 20.0)
    detector.heard(A, FIRST, 25.0)
    assert detector.age_s(A, 25.0) == 5.0
    detector.exited(B, FIRST, "", 11.0)
    detector.heard(B, FIRST, 12.0)
    assert detector.age_s(B, 12.0) == 2.0
    detector.heard(RankId(9), FIRST, 12.0)
    assert detector.age_s(RankId(9), 12.0) is None


def test_a_new_process_starts_with_a_clean_slate() -> None:
    detector = running()
    detector.exited(A, FIRST, "", 11.0)
    detector.launched(A, SECOND, 20.0)
    assert not detector.suspect(A, 20.5)
    assert detector.exited(A, SECOND, "", 20.5) is not None


# ---- silence --------------------------------------------------------------------------------

C, D = RankId(2), RankId(3)
ALL = frozenset({A, B, C, D})


def four(now: float = 10.0) -> Detector:
    detector = Detector(Policy(suspect_after_s=1.0, accuse_after_s=1.3, doubt_s=1.3))
    for rank in sorted(ALL):
        detector.launched(rank, FIRST, now)
        detector.heard(rank, FIRST, now)
    return detector


def hear(detector: Detector, now: float, *ranks: RankId) -> None:
    for rank in ranks:
        detector.heard(rank, FIRST, now)


def test_silence_accuses_later_than_it_makes_suspect() -> None:
    detector = four()
    hear(detector, 11.2, A, B, C)
    assert detector.suspect(D, 11.2)
    assert detector.judge(ALL, 11.2) == []
    (fault,) = detector.judge(ALL, 11.31)
    assert (fault.rank, fault.kind) == (D, "heartbeat")
    assert 1.3 < fault.detect_s < 1.32


def test_who_is_not_watched_is_not_judged() -> None:
    assert four().judge(frozenset({A}), 10.5) == []
    detector = four()
    hear(detector, 20.0, A, B, C)
    assert detector.judge(ALL - {D}, 20.0) == []


def test_more_than_half_silent_means_that_the_engine_doubts_itself_first() -> None:
    detector = four()
    hear(detector, 20.0, A)
    assert detector.judge(ALL, 20.0) == []
    hear(detector, 21.0, A)
    assert detector.judge(ALL, 21.0) == [], "still in doubt"
    hear(detector, 21.4, A)
    assert [f.rank for f in detector.judge(ALL, 21.4)] == [B, C, D], "but not for ever"


def test_doubt_that_was_justified_leaves_no_trace() -> None:
    detector = four()
    assert detector.judge(ALL, 20.0) == []
    hear(detector, 20.1, A, B, C, D)
    assert detector.judge(ALL, 20.2) == []
    hear(detector, 23.0, A, B, C)
    assert [f.rank for f in detector.judge(ALL, 23.0)] == [D]


def test_a_stall_of_the_engine_excuses_silence() -> None:
    detector = four()
    detector.postpone(3.0)
    assert detector.judge(ALL, 13.5) == []
    hear(detector, 14.4, A, B, C)
    assert [f.rank for f in detector.judge(ALL, 14.4)] == [D]


# ---- hangs ----------------------------------------------------------------------------------


def doing(detector: Detector, rank: RankId, activity: Activity, now: float = 10.0) -> None:
    hear(detector, now, A, B, C, D)
    for _ in range(2):
        detector.beat(Heartbeat(rank, FIRST, 1, RankStats(), activity))


def working(since_s: float, budget_s: float | None, layer: int = 3) -> Activity:
    return Activity("working", "experts", layer, 7, since_s, budget_s)


def test_the_rank_whose_own_work_stands_still_is_hung_and_not_those_that_wait() -> None:
    detector = four()
    for rank in (A, B, C):
        doing(detector, rank, Activity("waiting", "combine", 3, 7, 9.0, 0.01))
    doing(detector, D, working(1.01, 0.02))
    (fault,) = detector.judge(ALL, 10.0)
    assert (fault.rank, fault.kind) == (D, "hang")
    assert "experts, layer 3" in fault.detail
    assert fault.signature == "hang:experts, layer 3"
    assert fault.detect_s >= 1.01


def test_overdue_is_relative_to_what_the_rows_predict() -> None:
    detector = four()
    doing(detector, D, working(9.9, 2.0))
    assert detector.judge(ALL, 10.0) == [], "a long prefill is no hang"
    doing(detector, D, working(10.1, 2.0))
    assert len(detector.judge(ALL, 10.0)) == 1


def test_work_never_seen_before_gets_time() -> None:
    detector = four()
    doing(detector, D, working(29.0, None))
    assert detector.judge(ALL, 10.0) == []
    doing(detector, D, working(31.0, None))
    assert len(detector.judge(ALL, 10.0)) == 1


def test_an_idle_rank_that_does_not_tick_is_hung() -> None:
    detector = four()
    doing(detector, D, Activity("idle", since_s=0.9))
    assert detector.judge(ALL, 10.0) == []
    doing(detector, D, Activity("idle", since_s=1.1))
    assert [f.kind for f in detector.judge(ALL, 10.0)] == ["hang"]


def test_what_was_announced_may_take_as_long_as_was_said() -> None:
    detector = four()
    doing(detector, D, Activity("announced", "load", since_s=100.0, budget_s=120.0))
    assert detector.judge(ALL, 10.0) == []
    doing(detector, D, Activity("announced", "load", since_s=121.0, budget_s=120.0))
    assert [f.kind for f in detector.judge(ALL, 10.0)] == ["hang"]


def test_hangs_are_told_by_the_ranks_own_clocks_so_the_engine_need_not_doubt_itself() -> None:
    detector = four()
    for rank in (A, B, C):
        doing(detector, rank, working(2.0, 0.01))
    assert [f.rank for f in detector.judge(ALL, 10.0)] == [A, B, C]


def waiting(name: str, layer: int, step: int = 7, since_s: float = 1.5) -> Activity:
    return Activity("waiting", name, layer, step, since_s, 0.01)


def test_a_rank_stuck_in_a_wait_is_behind_all_others() -> None:
    detector = four()
    for rank in (A, B, C):
        doing(detector, rank, waiting("combine", 3))
    doing(detector, D, waiting("dispatch", 3))
    (fault,) = detector.judge(ALL, 10.0)
    assert (fault.rank, fault.kind) == (D, "hang")


def test_all_waiting_at_one_place_accuses_nobody() -> None:
    detector = four()
    for rank in ALL:
        doing(detector, rank, waiting("combine", 3))
    assert detector.judge(ALL, 10.0) == []
    doing(detector, D, waiting("dispatch", 3))
    doing(detector, C, waiting("dispatch", 3))
    assert detector.judge(ALL, 10.0) == [], "two against two: no telling"
    doing(detector, A, waiting("schedule", -1, step=8, since_s=0.5))
    assert detector.judge(ALL, 10.0) == [], "one has only just come there"


def test_a_rank_that_announced_a_long_load_may_be_silent_for_as_long() -> None:
    detector = four()
    doing(detector, D, Activity("announced", "load", since_s=0.0, budget_s=20.0))
    hear(detector, 25.0, A, B, C)
    assert detector.judge(ALL, 29.9) == [], "15 + 4.9 s"
    hear(detector, 30.5, A, B, C)
    assert [f.rank for f in detector.judge(ALL, 30.6)] == [D]


def test_one_heartbeat_is_not_enough_to_call_it_a_hang() -> None:
    """After a stall of the machine the control thread may run again before the step loop does."""
    detector = four()
    hear(detector, 10.0, A, B, C, D)
    detector.beat(Heartbeat(D, FIRST, 7, RankStats(), working(1.5, 0.01)))
    assert detector.judge(ALL, 10.0) == []
    detector.beat(Heartbeat(D, FIRST, 8, RankStats(), working(1.6, 0.01)))
    assert detector.judge(ALL, 10.0) == [], "it got on in between"
    detector.beat(Heartbeat(D, FIRST, 8, RankStats(), working(1.7, 0.01)))
    assert [f.kind for f in detector.judge(ALL, 10.0)] == ["hang"]


def test_a_rank_that_is_still_building_its_domain_is_not_behind() -> None:
    detector = four()
    for rank in (A, B, C):
        doing(detector, rank, waiting("schedule", -1))
    doing(detector, D, waiting("", -1, step=0))
    assert detector.judge(ALL, 10.0) == []
