"""Rank to engine (msgpack on the wire, never pickle).

First-in first-out per rank, which the fence relies on: a `FenceAck` follows every token the rank
had committed.
"""

import msgspec

from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.membership.placement import Table
from revivemoe.messages.tally import Tally
from revivemoe.messages.tokens import CommittedToken, PromptLogprobs

STEP_PHASES = ("schedule", "attention", "dispatch", "experts", "combine", "sample", "commit")
"""Of a step, in order. From `attention` to `combine` once for each layer."""
PRODUCERS = ("attention", "experts", "combine", "sample")
"""Phases whose output may be found not to be finite, in order."""


class RankStats(msgspec.Struct, frozen=True):
    """A rank's own view of its load, sent with each heartbeat."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    last_step: int = 0
    parked: bool = False
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefilled_tokens: int = 0
    survivor_refills: int = 0
    """Tokens prefilled again on a rank that held them before a fence. Must stay 0."""
    memory_bytes: int = 0
    """What weights, expert slots and KV pages take on the rank's device."""
    step_s: float = 0.0
    """Seconds spent in steps that were run, from the first exchange to the commit."""
    waited_s: float = 0.0
    """Of these, seconds spent waiting for peers."""
    recompiled: int = 0
    """Graphs that were compiled since this process was ready, and layers run without theirs."""


class FromRank(msgspec.Struct, frozen=True):
    """What every report begins with: the process it comes from."""

    rank: RankId
    incarnation: Incarnation


class Hello(FromRank, frozen=True, tag=True):
    """First message of a process: its control channel is up."""

    pid: int
    host: str


class Ready(FromRank, frozen=True, tag=True):
    """Weights are loaded and the KV cache is allocated; the rank awaits `Configure`."""

    device: str
    kv_blocks_total: int
    load_s: float
    maskable: bool = True
    """Whether this model's routers can leave missing experts out."""
    load_bytes: int = 0
    """Of experts, after a role switch in the background."""
    load_sources: dict[str, int] = {}
    kernels: str = ""
    """What it computes with, and why not with our own; empty where nothing has changed."""
    graphs: str = ""
    """Of graph mode: how many there are and what they took, or why there are none."""


class Activity(msgspec.Struct, frozen=True):
    """What a rank's step loop is doing, as its control thread sees it."""

    kind: str = "idle"
    """idle: waits for commands | waiting: for its peers | working: on its own | announced: what
    takes long, and is known to (load, first step ...)"""
    name: str = ""
    """Phase of the step, or what was announced."""
    layer: int = -1
    step: int = 0
    since_s: float = 0.0
    """Seconds since its last progress, by the rank's own clock."""
    budget_s: float | None = None
    """What its rows predict for this work, or what was announced, seconds; None: no experience."""


class Pace(msgspec.Struct, frozen=True):
    """How long one kind of own work takes on a rank, waits not counted."""

    phase: str
    size: int
    """Logarithm, base 2, of the number of rows."""
    seconds: float
    """Moving average per call."""
    count: int


class Heartbeat(FromRank, frozen=True, tag=True):
    progress: int
    """Grows with every phase of every step, and while parked."""
    stats: RankStats
    activity: Activity = Activity()
    pace: list[Pace] | None = None
    """Now and then."""
    holdings: Tally | None = None
    """What it holds between two steps; sent behind all tokens that this counts."""


class Tokens(FromRank, frozen=True, tag=True):
    """What one step committed on one rank."""

    epoch: Epoch
    step: int
    tokens: list[CommittedToken]
    prompt_logprobs: list[PromptLogprobs] = []
    step_s: float = 0.0
    """Wall time of the step on this rank, seconds."""


class Holdings(FromRank, frozen=True, tag=True):
    """Answer to `TellHoldings`: the rank's live sequences and committed lengths."""

    request: int
    num_output: dict[SeqId, int]


class FenceAck(FromRank, frozen=True, tag=True):
    """The rank has left its domain and rolled back. Its live sequences and committed lengths."""

    epoch: Epoch
    next_step: int
    """The step this rank would run next; the new epoch starts at the maximum over survivors."""
    num_output: dict[SeqId, int]
    rolled_back: bool
    """Whether a step was open and has been undone."""
    rollback_s: float = 0.0
    """Seconds from taking up the fence to this message."""
    slots: Table | None = None
    """Experts in its slots in truth, [L][S], or () without slots. EMPTY also where a load is under
    way or has failed. None: the rank does not tell."""


class Resumed(FromRank, frozen=True, tag=True):
    """The first step of the epoch has been agreed: every member of the domain is there."""

    epoch: Epoch
    step: int
    domain_s: float
    """Seconds this rank spent building the domain."""
    experts_s: float = 0.0
    """Seconds it spent loading experts before that."""
    experts_loaded: int = 0
    experts_bytes: int = 0
    experts_sources: dict[str, int] = {}
    """Experts loaded, by where they came from: peer | host | disk."""


class StepAborted(FromRank, frozen=True, tag=True):
    """Communication failed under this rank: a symptom, never an accusation."""

    epoch: Epoch
    step: int
    detail: str


class NonFinite(FromRank, frozen=True, tag=True):
    """A step met NaN or infinity here; it is undone, as `StepAborted` says next.

    The places of a step in order: for each layer attention, experts, combine; then the logits.
    """

    epoch: Epoch
    step: int
    layer: int
    phase: str
    """attention | experts | combine | sample"""
    produced_here: bool
    """True if what came in there was finite: this rank is the producer."""


class ExpertsLoaded(FromRank, frozen=True, tag=True):
    """Answer to `LoadExperts`: they lie in their slots, or why not."""

    request: int
    seconds: float
    num_bytes: int
    error: str | None = None
    taken_over: bool = False
    """The error is that a later load was given its slots."""


class Fatal(FromRank, frozen=True, tag=True):
    """Last words of a rank whose own code failed. Its exit follows."""

    detail: str
    user_error: bool = False
    """True when mending lies with the user (bad checkpoint, no memory): one line, no traceback."""


Trouble = StepAborted | NonFinite | Fatal
OfSequences = Tokens | Holdings
Report = Hello | Ready | Heartbeat | OfSequences | FenceAck | Resumed | ExpertsLoaded | Trouble
