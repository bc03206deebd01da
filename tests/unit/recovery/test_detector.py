from revivemoe.ids import Incarnation, RankId
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import ISOLATE, Fault

A, B = RankId(0), RankId(1)
FIRST, SECOND = Incarnation(1), Incarnation(2)


def running() -> Detector:
    detector = Detector(suspect_after_s=1.0)
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
