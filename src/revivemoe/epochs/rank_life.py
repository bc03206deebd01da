"""The life of one rank's process: a tagged union, and which event leads from where to where.

    Gone -> Queued -> Spawning -> Loading -> Ready -> Member -> Leaving -> Gone
                                                ^-- Switching <-'
    from every state with a process: -> Condemned -> Gone

Every state but `Member` and `Gone` has a deadline, and somebody who acts on it (`fleet`). What is
not named in `transition` is refused: it changes nothing. Pure; times are passed in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from revivemoe.ids import Epoch

# ---- states -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gone:
    """No process."""

    since: float


@dataclass(frozen=True)
class Queued:
    """No process; one is to be started at the deadline."""

    since: float
    deadline: float


@dataclass(frozen=True)
class Spawning:
    """A process was asked for, and has not come into being as far as is known."""

    since: float
    deadline: float


@dataclass(frozen=True)
class Loading:
    """It runs, and loads what its role needs."""

    since: float
    deadline: float


@dataclass(frozen=True)
class Ready:
    """It has loaded, and waits to be taken into an epoch."""

    since: float
    deadline: float


@dataclass(frozen=True)
class Member:
    """It takes part in an epoch."""

    since: float
    epoch: Epoch
    draining: bool = False
    """Nothing new goes there: it is about to leave or to change its role."""


@dataclass(frozen=True)
class Switching:
    """It was a member, and loads for another role beside the others."""

    since: float
    deadline: float


@dataclass(frozen=True)
class Leaving:
    """It was told to stop, in good order."""

    since: float
    deadline: float


@dataclass(frozen=True)
class Condemned:
    """It is out, and is killed: in the moment it comes into being, if it has not yet."""

    since: float
    deadline: float
    arrived: bool
    overdue: bool = False
    """It has not gone within its time: nobody waits for that any more."""


Life = (
    Gone | Queued | Spawning | Loading | Ready | Member | Switching | Leaving | Condemned
)  # fmt: skip
STATES = (Gone, Queued, Spawning, Loading, Ready, Member, Switching, Leaving, Condemned)

# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queue:
    """A new process is wanted, at `until` and not before."""

    until: float


@dataclass(frozen=True)
class Spawn:
    """A new process is asked for."""

    until: float


@dataclass(frozen=True)
class Arrived:
    """The process has come into being."""

    until: float


@dataclass(frozen=True)
class Spoke:
    """It has said its first word."""

    until: float


@dataclass(frozen=True)
class Loaded:
    """It is ready for its role."""

    until: float


@dataclass(frozen=True)
class TakenIn:
    """The epoch has begun, with it."""

    epoch: Epoch


@dataclass(frozen=True)
class Drain:
    """It is about to leave, or, not `on`, is not any more."""

    on: bool = True


@dataclass(frozen=True)
class Switch:
    """It was told to change its role. There is no way back."""

    until: float
    aside: bool
    """It says when it is ready; otherwise it is, and loads as the next epoch begins."""


@dataclass(frozen=True)
class Dismissed:
    """It was told to stop."""

    until: float


@dataclass(frozen=True)
class Accused:
    """It is out; or was, and has not gone in time."""

    until: float
    late: bool = False


@dataclass(frozen=True)
class Exited:
    """Its process is gone, or can never come into being."""


Event = (
    Queue
    | Spawn
    | Arrived
    | Spoke
    | Loaded
    | TakenIn
    | Drain
    | Switch
    | Dismissed
    | Accused
    | Exited
)  # fmt: skip

# ---- transitions --------------------------------------------------------------------------------

BEFORE_EPOCH = (Spawning, Loading, Ready, Switching)
WITH_PROCESS = (*BEFORE_EPOCH, Member, Leaving, Condemned)
OUT = (Gone, Queued, Leaving, Condemned)


def transition(life: Life, event: Event, now: float) -> Life | None:
    """The state after the event; None if the event is refused there."""
    return _HANDLERS[type(event)](life, event, now)


def _queue(life: Life, event: Queue, now: float) -> Life | None:
    return Queued(now, event.until) if isinstance(life, Gone) else None


def _spawn(life: Life, event: Spawn, now: float) -> Life | None:
    return Spawning(now, event.until) if isinstance(life, Gone | Queued) else None


def _arrive(life: Life, event: Arrived, now: float) -> Life | None:
    match life:
        case Spawning():
            return Loading(now, event.until)
        case Condemned(arrived=False):
            return replace(life, arrived=True)
        case _:
            return None


def _speak(life: Life, event: Spoke, now: float) -> Life | None:
    match life:
        case Spawning() | Loading():  # what it says may come before the word that it is there
            return Loading(life.since, event.until)
        case _:
            return None


def _load(life: Life, event: Loaded, now: float) -> Life | None:
    match life:
        case Spawning() | Loading() | Switching():
            return Ready(now, event.until)
        case Ready():  # what it waits for is under way, and takes longer
            return replace(life, deadline=event.until)
        case _:
            return None


def _take_in(life: Life, event: TakenIn, now: float) -> Life | None:
    match life:
        case Ready():
            return Member(now, event.epoch)
        case Member():
            return Member(life.since, event.epoch, life.draining)
        case _:
            return None


def _drain(life: Life, event: Drain, now: float) -> Life | None:
    return replace(life, draining=event.on) if isinstance(life, Member) else None


def _switch(life: Life, event: Switch, now: float) -> Life | None:
    if not isinstance(life, Member | Ready):
        return None
    return Switching(now, event.until) if event.aside else Ready(now, event.until)


def _dismiss(life: Life, event: Dismissed, now: float) -> Life | None:
    match life:
        case Loading() | Ready() | Member() | Switching():
            return Leaving(now, event.until)
        case Queued():
            return Gone(now)
        case _:
            return None


def _accuse(life: Life, event: Accused, now: float) -> Life | None:
    match life:
        case Condemned():
            return replace(life, deadline=event.until, overdue=life.overdue or event.late)
        case Gone():
            return None
        case Queued():
            return Gone(now)
        case _:
            return Condemned(now, event.until, arrived=not isinstance(life, Spawning))


def _exit(life: Life, event: Exited, now: float) -> Life | None:
    return Gone(now) if isinstance(life, WITH_PROCESS) else None


_HANDLERS: dict[type, Callable[..., Life | None]] = {
    Queue: _queue,
    Spawn: _spawn,
    Arrived: _arrive,
    Spoke: _speak,
    Loaded: _load,
    TakenIn: _take_in,
    Drain: _drain,
    Switch: _switch,
    Dismissed: _dismiss,
    Accused: _accuse,
    Exited: _exit,
}
EVENTS = tuple(_HANDLERS)


def deadline(life: Life) -> float | None:
    """Until when it may stay so; None: for as long as it likes."""
    return None if isinstance(life, Gone | Member) else life.deadline


def later(life: Life, seconds: float) -> Life:
    """The same with a later deadline."""
    return (
        life if isinstance(life, Gone | Member) else replace(life, deadline=life.deadline + seconds)
    )


WAITS_FOR = {
    "Gone": "nothing",
    "Queued": "its time to be started again",
    "Spawning": "its process",
    "Loading": "its weights",
    "Ready": "the next epoch",
    "Member": "nothing",
    "Switching": "the weights of its new role",
    "Leaving": "its process to end",
    "Condemned": "its process to be gone",
}
AT_DEADLINE = {
    "Queued": "a process is started",
    "Spawning": "it is given up and killed when it comes",
    "Loading": "it is killed",
    "Ready": "it is killed",
    "Switching": "it is killed",
    "Leaving": "it is killed",
    "Condemned": "it is killed again, and nobody waits for it",
}
"""What each state waits for, and what happens when that does not come in time."""
