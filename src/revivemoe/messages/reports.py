"""Typed messages between the engine and its ranks (msgpack on the wire, never pickle).

Engine to rank: `Command`. Rank to engine: `Report`. Both directions are first-in first-out per
rank, which the fence relies on: a `FenceAck` follows every token the rank had committed.
"""

from typing import Any

import msgspec

from revivemoe.ids import Epoch, ExpertId, Incarnation, LayerId, RankId, SeqId, SlotId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.placement import ExpertPlacement
from revivemoe.membership.topology import Topology
from revivemoe.sampling_params import SamplingParams


class SequenceSpec(msgspec.Struct, frozen=True):
    """A sequence as it is handed to a rank: new, or migrated with what it has committed so far."""

    seq_id: SeqId
    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    arrival: int
    """Admission order over the whole instance; smaller is older."""
    prompt_logprobs_done: int = 0
    """Prompt positions whose log-probabilities the engine already holds."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of one token and of the most likely alternatives at its position."""

    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), most likely first."""


class CommittedToken(msgspec.Struct, frozen=True):
    seq_id: SeqId
    position: int
    """Index into the output tokens: the log appends if and only if it equals its length."""
    token_id: int
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(msgspec.Struct, frozen=True):
    seq_id: SeqId
    start: int
    """Prompt position of the first entry. Position 0 has no predecessor and is never sent."""
    entries: list[TokenLogprobs]


# ---- engine to rank -------------------------------------------------------------------------


class Add(msgspec.Struct, frozen=True, tag=True):
    """Take over a sequence. A second `Add` of a live `seq_id` is ignored (idempotent)."""

    sequence: SequenceSpec


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget a sequence and free its blocks. Unknown ids are ignored."""

    seq_id: SeqId


class Wake(msgspec.Struct, frozen=True, tag=True):
    """There is work in the domain: take part in steps again. Sent to *all* members."""

    counter: int


class Fence(msgspec.Struct, frozen=True, tag=True):
    """Leave the domain of every epoch below `epoch`, roll the open step back, acknowledge.

    `at_boundary`: not at once, but together with all members before the next step, so that
    nothing is rolled back. A later fence without it overrules that.
    """

    epoch: Epoch
    at_boundary: bool = False


class DomainSpec(msgspec.Struct, frozen=True):
    """How the members of one epoch reach each other."""

    backend: str
    """shm | gloo | nccl"""
    store_address: str | None = None
    """host:port of the engine's TCP store (gloo, nccl)."""
    timeout_s: float = 30.0
    """Bound on every wait inside the domain."""
    channels: int = 1
    """Independent sequences of exchanges: one for each micro-batch."""
    weights: dict[RankId, str] = {}
    """Where each rank serves its experts' weights to its peers."""


class Configure(msgspec.Struct, frozen=True, tag=True):
    """Enter a new epoch: membership, expert map, domain, and the first step's number.

    Experts that the map gives to this rank and that are not in their slots yet are loaded first.
    """

    epoch: Epoch
    step: int
    topology: Topology
    placement: ExpertPlacement
    domain: DomainSpec
    wake: int
    dense: DenseGroups | None = None
    """Groups that share the dense layers, if they are shared; shards that this rank is to hold and
    does not are loaded first."""


class SlotLoad(msgspec.Struct, frozen=True):
    """One expert that shall lie in one slot of the rank this is sent to."""

    layer: LayerId
    slot: SlotId
    expert: ExpertId


class LoadExperts(msgspec.Struct, frozen=True, tag=True):
    """Load experts into slots that the present epoch does not use, beside the steps.

    `ExpertsLoaded` answers it. They are used from the next epoch whose placement names them.
    """

    request: int
    loads: tuple[SlotLoad, ...]


class SwitchRole(msgspec.Struct, frozen=True, tag=True):
    """Give the attention role up, outside of any epoch, and load the experts that `placement` gives
    to this rank. `Ready` answers it: then it waits to be taken in as an expert rank.
    """

    epoch: Epoch
    """The one it has been fenced for: a later fence ends the switch."""
    placement: ExpertPlacement
    domain: DomainSpec


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave and exit with status 0."""


class Inject(msgspec.Struct, frozen=True, tag=True):
    """One-shot fault at an exact point of a step (only with fault injection enabled)."""

    injection_id: str
    kind: str
    step: int | None = None
    layer: int | None = None
    phase: str | None = None
    params: dict[str, Any] = {}
    """`factor` (slow), `how` (hang: loop | stop | deadlock), `peer` and `peer_pid` (comm),
    `prompt_token` (any kind: strikes whenever a sequence with this token in its prompt runs, and
    is not one-shot: a request that kills whoever runs it)."""


Command = Add | Abort | Wake | Fence | Configure | LoadExperts | SwitchRole | Stop | Inject


# ---- rank to engine -------------------------------------------------------------------------


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


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a process: its control channel is up."""

    rank: RankId
    incarnation: Incarnation
    pid: int
    host: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Weights are loaded and the KV cache is allocated; the rank awaits `Configure`."""

    rank: RankId
    incarnation: Incarnation
    device: str
    kv_blocks_total: int
    load_s: float
    maskable: bool = True
    """Whether this model's routers can leave missing experts out."""
    load_bytes: int = 0
    """Of experts, after a role switch in the background."""
    load_sources: dict[str, int] = {}


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


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    rank: RankId
    incarnation: Incarnation
    progress: int
    """Grows with every phase of every step, and while parked."""
    stats: RankStats
    activity: Activity = Activity()
    pace: list[Pace] | None = None
    """Now and then."""


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """What one step committed on one rank."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: int
    tokens: list[CommittedToken]
    prompt_logprobs: list[PromptLogprobs] = []
    step_s: float = 0.0
    """Wall time of the step on this rank, seconds."""


class FenceAck(msgspec.Struct, frozen=True, tag=True):
    """The rank has left its domain and rolled back. Its live sequences and committed lengths."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    next_step: int
    """The step this rank would run next; the new epoch starts at the maximum over survivors."""
    num_output: dict[SeqId, int]
    rolled_back: bool
    """Whether a step was open and has been undone."""
    rollback_s: float = 0.0
    """Seconds from taking up the fence to this message."""


class Resumed(msgspec.Struct, frozen=True, tag=True):
    """The first step of the epoch has been agreed: every member of the domain is there."""

    rank: RankId
    incarnation: Incarnation
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


class StepAborted(msgspec.Struct, frozen=True, tag=True):
    """Communication failed under this rank: a symptom, never an accusation."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: int
    detail: str


class NonFinite(msgspec.Struct, frozen=True, tag=True):
    """A step met NaN or infinity here; it is undone, as `StepAborted` says next.

    The places of a step in order: for each layer attention, experts, combine; then the logits.
    """

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: int
    layer: int
    phase: str
    """attention | experts | combine | sample"""
    produced_here: bool
    """True if what came in there was finite: this rank is the producer."""


class ExpertsLoaded(msgspec.Struct, frozen=True, tag=True):
    """Answer to `LoadExperts`: they lie in their slots, or why not."""

    rank: RankId
    incarnation: Incarnation
    request: int
    seconds: float
    num_bytes: int
    error: str | None = None


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """Last words of a rank whose own code failed. Its exit follows."""

    rank: RankId
    incarnation: Incarnation
    detail: str
    user_error: bool = False
    """True when mending lies with the user (bad checkpoint, no memory): one line, no traceback."""


Report = (
    Hello
    | Ready
    | Heartbeat
    | Tokens
    | FenceAck
    | Resumed
    | StepAborted
    | NonFinite
    | ExpertsLoaded
    | Fatal
)
