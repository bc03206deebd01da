"""What the benches read of the server's JSON; it has more. Times in seconds."""

from typing import TypedDict


class EngineStatus(TypedDict):
    id: int
    pid: int | None
    status: str
    roles: list[str]
    logical_rank: int | None
    incarnation: int
    running: int
    waiting: int
    kv_blocks_used: int
    graphs: str
    recompiled: int


class FaultTold(TypedDict):
    id: int
    kind: str
    detail: str


class Recovery(TypedDict):
    epoch: int
    cause: str
    faults: list[FaultTold]
    reason: str
    detect_s: float
    stall_s: float | None
    phases: dict[str, float]
    migrated: int
    recomputed_tokens: int
    experts_dropped: int
    role_switched: int | None
    rolled_back: int


class Status(TypedDict):
    """`GET /v1/fault_tolerance/status`."""

    state: str
    epoch: int
    quality: str
    engines: list[EngineStatus]
    experts: dict[str, object]
    recoveries: list[Recovery]


class Event(TypedDict, total=False):
    """Of `GET /v1/fault_tolerance/events`; `event` and `time` (since 1970) are always there."""

    event: str
    time: float
    state: str
    epoch: int
    requests: list[str]
    bytes: int
    seconds: float
    sources: dict[str, int]


class ChunkChoice(TypedDict, total=False):
    token_ids: list[int]
    text: str
    finish_reason: str | None


class Chunk(TypedDict, total=False):
    """Of a streamed completion, or its error."""

    id: str
    quality: str
    choices: list[ChunkChoice]
    error: dict[str, str | None]
