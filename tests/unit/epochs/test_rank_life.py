"""The union of a rank's life: every event in every state, and what a fleet makes of it."""

import itertools
from random import Random
from typing import Any

import pytest

from revivemoe.epochs import rank_life as life
from revivemoe.epochs.rank_life import (
    AT_DEADLINE,
    EVENTS,
    OUT,
    STATES,
    WAITS_FOR,
    WITH_PROCESS,
    Condemned,
    Gone,
    Life,
    Member,
    deadline,
    later,
    transition,
)
from revivemoe.ids import Epoch

NOW, UNTIL = 10.0, 20.0


def one_of(state: type) -> list[Life]:
    """Every variant of a state that can tell a transition apart."""
    match state:
        case life.Gone:
            return [Gone(1.0)]
        case life.Member:
            return [Member(1.0, Epoch(3)), Member(1.0, Epoch(3), draining=True)]
        case life.Condemned:
            return [Condemned(1.0, 2.0, *flags) for flags in itertools.product((0, 1), (0, 1))]  # type: ignore[arg-type]
        case _:
            return [state(1.0, 2.0)]


def event(kind: type) -> Any:
    match kind:
        case life.TakenIn:
            return life.TakenIn(Epoch(4))
        case life.Switch:
            return life.Switch(UNTIL, aside=True)
        case life.Exited | life.Drain:
            return kind()
        case _:
            return kind(UNTIL)


ALL = [one for state in STATES for one in one_of(state)]


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("before", ALL)
def test_every_event_leads_to_a_named_state_or_is_refused(before: Life, kind: type) -> None:
    after = transition(before, event(kind), NOW)
    if after is None:
        return
    assert type(after) in STATES
    until = deadline(after)
    assert (until is None) == isinstance(after, Gone | Member), "a state without a deadline"
    if until is not None and kind is not life.Arrived:
        assert until == UNTIL, "the deadline of the event counts"
    assert later(after, 5.0) == after or deadline(later(after, 5.0)) == until + 5.0  # type: ignore[operator]


def test_each_state_says_what_it_waits_for_and_what_comes_of_it() -> None:
    names = {state.__name__ for state in STATES}
    assert WAITS_FOR.keys() == names
    assert AT_DEADLINE.keys() == names - {"Gone", "Member"}


def test_only_an_exit_ends_a_process_and_only_a_spawn_begins_one() -> None:
    for before in ALL:
        for kind in EVENTS:
            after = transition(before, event(kind), NOW)
            if after is None:
                continue
            if kind is life.Exited:
                assert isinstance(after, Gone)
            elif kind is life.Spawn:
                assert not isinstance(before, WITH_PROCESS)
            else:
                assert isinstance(before, WITH_PROCESS) == isinstance(after, WITH_PROCESS)


def test_whoever_is_out_never_takes_part_again() -> None:
    for before in ALL:
        if not isinstance(before, OUT):
            continue
        for kind in EVENTS:
            after = transition(before, event(kind), NOW)
            assert after is None or isinstance(after, OUT) or kind is life.Spawn


def test_from_every_state_a_walk_ends_gone() -> None:
    """Whatever happens, an accusation and an exit end it: nothing is stuck."""
    rng = Random(0)
    for _ in range(2000):
        walk: Life = rng.choice(ALL)
        for _ in range(rng.randrange(12)):
            walk = transition(walk, event(rng.choice(EVENTS)), NOW) or walk
        walk = transition(walk, life.Accused(UNTIL), NOW) or walk
        walk = transition(walk, life.Exited(), NOW) or walk
        assert isinstance(walk, Gone)
