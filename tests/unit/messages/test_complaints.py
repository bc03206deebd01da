"""What goes wrong again and again is counted, and told of now and then."""

from revivemoe.messages.complaints import TELL_EVERY_S, Complaints


def test_the_first_is_told_at_once_and_then_how_many_there_were() -> None:
    told: list[tuple[str, str]] = []
    complaints = Complaints("bad messages", lambda line, error: told.append((line, str(error))))
    for k in range(5):
        complaints.add(ValueError(str(k)), 100.0 + k)
    assert told == [("bad messages: 1, the last: ValueError('0')", "0")]
    complaints.add(ValueError("late"), 100.0 + TELL_EVERY_S)
    assert told[1:] == [("bad messages: 5, the last: ValueError('late')", "late")]
    assert complaints.count == 6
