"""Engine to rank (msgpack on the wire, never pickle). First-in first-out per rank."""

import msgspec

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId, SeqId, SlotId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Table
from revivemoe.messages.tokens import SequenceSpec


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
    """Enter a new epoch: its membership, its domain, and the first step's number.

    What the membership gives to this rank, experts or shards of dense layers, and what it does not
    hold yet, is loaded first.
    """

    step: int
    membership: Membership
    domain: DomainSpec
    wake: int

    @property
    def epoch(self) -> Epoch:
        return self.membership.epoch


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
    """Give the attention role up, outside of any epoch, and load these experts into one's slots.
    `Ready` answers it: then it waits to be taken in as an expert rank.
    """

    membership: Membership
    """Of the epoch it has been fenced for (a later fence ends the switch), without this rank."""
    table: Table
    domain: DomainSpec


class TellHoldings(msgspec.Struct, frozen=True, tag=True):
    """Say which sequences are held, behind every token that is committed. `Holdings` answers it."""

    request: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave and exit with status 0."""


class Inject(msgspec.Struct, frozen=True, tag=True):
    """One-shot fault at an exact point of a step (only with fault injection enabled)."""

    injection_id: str
    kind: str
    step: int | None = None
    layer: int | None = None
    phase: str | None = None
    params: dict[str, object] = {}
    """`factor` (slow), `how` (hang: loop | stop | deadlock), `peer` and `peer_pid` (comm),
    `prompt_token` (any kind: strikes whenever a sequence with this token in its prompt runs, and
    is not one-shot: a request that kills whoever runs it)."""


OfSequences = Add | Abort | Wake | TellHoldings
Command = OfSequences | Fence | Configure | LoadExperts | SwitchRole | Stop | Inject
