"""What an instance tells whoever follows it: every signal, decision and stage, as a value.

The names and fields on the wire are part of the public contract: `document` is the one encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, dataclass_transform

from revivemoe.ids import Epoch, Incarnation, RankId


@dataclass_transform(frozen_default=True)
class Event:
    """`event` is its name on the wire. Each kind of event is a frozen dataclass."""

    event: ClassVar[str]

    def __init_subclass__(cls, event: str) -> None:
        cls.event = event
        dataclass(frozen=True)(cls)


Tell = Callable[[Event], None]
EventDocument = dict[str, object]


def document(event: Event) -> EventDocument:
    """An event as a JSON object."""
    assert is_dataclass(event), f"{event} is no event"
    return {"event": event.event, **{f.name: getattr(event, f.name) for f in fields(event)}}


# ---- states and changes of epoch ----------------------------------------------------------------


class StateEntered(Event, event="state"):
    state: str
    epoch: Epoch


class Fenced(Event, event="fence"):
    epoch: Epoch
    cause: str
    lost: list[RankId]
    survivors: int
    at_boundary: bool


class RestartPlanned(Event, event="restart"):
    ranks: list[RankId]
    reason: str


class Configured(Event, event="configure"):
    epoch: Epoch
    reason: str
    migrated: int


class RecoveryEnded(Event, event="recovery"):
    epoch: Epoch
    cause: str
    outcome: str | None
    reason: str
    request_id: str | None


class InternalError(Event, event="internal_error"):
    """Something could not be taken in: a defect of ours. What it would have brought about, the
    deadlines see to."""

    what: str
    detail: str


class InstanceFailed(Event, event="failed"):
    reason: str
    streams_ended: int


class Stalled(Event, event="engine_stalled"):
    """The engine itself stood still."""

    seconds: float


# ---- ranks --------------------------------------------------------------------------------------


class Launched(Event, event="launch"):
    id: RankId
    incarnation: Incarnation


class LifeChanged(Event, event="life"):
    """A rank's process is in another state, for at most `due_s` seconds; None: for any time."""

    id: RankId
    incarnation: Incarnation
    was: str
    state: str
    waits_for: str
    due_s: float | None


class RankReady(Event, event="ready"):
    id: RankId
    incarnation: Incarnation


class Accused(Event, event="fault"):
    id: RankId
    kind: str
    level: int
    detail: str
    detect_s: float


class Unkillable(Event, event="unkillable"):
    id: RankId
    pid: int | None


class RejoinQueued(Event, event="rejoin_queued"):
    """A lost rank will be started again."""

    id: RankId
    attempt: int
    delay_s: float


class RejoinGivenUp(Event, event="rejoin_given_up"):
    """It did not stay so many times in a row: it is left to the operator."""

    id: RankId
    attempts: int


class ForkserverGone(Event, event="forkserver_gone"):
    pass


class FoundSlow(Event, event="slow"):
    id: RankId
    factor: float
    detail: str


class DeviceReported(Event, event="device"):
    id: RankId
    level: int
    code: str
    action: str
    detail: str
    source: str


class DeviceFaultRefused(Event, event="device_refused"):
    """What a monitor says of these ranks asks for them to go, and the instance cannot go on without
    all of them: nobody is touched. Tried again in every later epoch until it is taken back."""

    ids: list[RankId]
    source: str
    code: str
    level: int
    action: str
    reason: str


class SymptomSeen(Event, event="symptom"):
    id: RankId
    detail: str


class NumbersBroken(Event, event="non_finite"):
    id: RankId
    where: str
    produced_here: bool


# ---- experts and roles --------------------------------------------------------------------------


class ExpertsTaken(Event, event="loaded"):
    """Loaded before a resume, or for a new role."""

    id: RankId
    seconds: float
    bytes: int
    sources: dict[str, int]


class LoadedBeside(Event, event="experts_loaded"):
    """Loaded beside the steps, or why not."""

    id: RankId
    experts: int
    seconds: float
    error: str | None


class LoadRefused(Event, event="load_failed"):
    id: RankId
    detail: str | None


class RoleSwitched(Event, event="role_switch"):
    id: RankId
    replaces: RankId | None
    aside: bool


# ---- requests and operators ---------------------------------------------------------------------


class Migrated(Event, event="migrated"):
    epoch: Epoch
    requests: list[str]


class Convicted(Event, event="convicted"):
    request: str
    detail: str


class RequestFailed(Event, event="request_failed"):
    """An error of the engine's own, or of the stream, at one request has ended it."""

    request: str
    error: str


class HoldingsMended(Event, event="holdings_mended"):
    """A rank had not what it was to have: so many sequences were handed over to it again."""

    id: RankId
    count: int


class Applied(Event, event="applied"):
    instruction: str
    params: dict[str, object]
    request_id: str


class DrainBegun(Event, event="drain"):
    id: RankId
    kind: str
    detail: str
    sequences: int
    request_id: str | None


class DrainRefused(Event, event="drain_refused"):
    id: RankId
    reason: str
    request_id: str | None
