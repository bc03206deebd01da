"""Another host than our Engine, put under recovery through `epochs.ports` alone.

`ToyHost` schedules sequences onto ranks in its own way: no token log, no router, no streams. It
shares nothing with `revivemoe.engine`; a rank is killed, and its sequences go on.
"""

from collections import deque
from dataclasses import dataclass, field

from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.epochs.signals import Signals
from revivemoe.epochs.state import Serving
from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Table, place
from revivemoe.membership.topology import collocated
from revivemoe.messages.commands import Abort, Add, Command, Configure, DomainSpec, Fence
from revivemoe.messages.reports import FenceAck, Ready, Report, Resumed, Tokens
from revivemoe.messages.tokens import CommittedToken, SequenceSpec
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.world import SequenceView
from revivemoe.sampling_params import SamplingParams

NUM_RANKS, LENGTH = 4, 12


@dataclass
class ToyCluster:
    """Ranks that count: the next token of a sequence is its length."""

    reports: deque[Report] = field(default_factory=deque)
    held: dict[RankId, dict[SeqId, int]] = field(default_factory=dict)
    epochs: dict[RankId, Epoch] = field(default_factory=dict)
    step: int = 0

    def launch(self, rank: RankId, incarnation: Incarnation, slots: Table) -> None:
        self.held[rank] = {}
        self.reports.append(Ready(rank, incarnation, "toy", 8, 0.0))

    def send(self, rank: RankId, command: Command) -> None:
        held, one = self.held.get(rank), Incarnation(1)
        match command:
            case _ if held is None:
                pass
            case Add(sequence=spec):
                held[spec.seq_id] = len(spec.output_ids)
            case Abort(seq_id=seq_id):
                held.pop(seq_id, None)
            case Fence(epoch=epoch):
                self.epochs.pop(rank, None)
                self.reports.append(FenceAck(rank, one, epoch, self.step, dict(held), True))
            case Configure():
                self.epochs[rank] = command.epoch
                self.reports.append(Resumed(rank, one, command.epoch, command.step, 0.0))

    def kill(self, rank: RankId) -> None:
        self.held.pop(rank, None)

    def domain(self) -> DomainSpec:
        return DomainSpec("toy")

    def run_step(self) -> None:
        self.step += 1
        for rank, epoch in self.epochs.items():
            if rank in self.held:
                tokens = [CommittedToken(s, n, n) for s, n in self.held[rank].items()]
                self.held[rank] = {s: n + 1 for s, n in self.held[rank].items()}
                self.reports.append(Tokens(rank, Incarnation(1), epoch, self.step, tokens))


class ToyHost:
    """A `SequenceOwner` in as few lines as it takes: dictionaries, and nothing else."""

    def __init__(self) -> None:
        self.cluster, self.now = ToyCluster(), 0.0
        topology = collocated(Epoch(1), NUM_RANKS)
        membership = Membership(topology, place(8, [0], topology.members, redundant=8))
        devices = dict.fromkeys(topology.members, "toy")
        self.events: list[object] = []
        tell, policy = self.events.append, Policy()
        fleet = Fleet(self.cluster, membership.placement, devices, policy, tell)
        self.epochs = Epochs(policy, membership, fleet, self, lambda: self.now, tell)
        self.signals = Signals(self.epochs, 10.0, tell)
        self.out: dict[SeqId, list[int]] = {}
        self.owner: dict[SeqId, RankId | None] = {}
        self.signals.start(self.now)
        self.deliver()

    def add(self, seq_id: int) -> None:
        self.out[SeqId(seq_id)], self.owner[SeqId(seq_id)] = [], None
        self.assign()

    def assign(self) -> None:
        members = self.epochs.membership.attention
        for seq_id in [s for s, rank in self.owner.items() if rank is None]:
            self.hand_over(seq_id, members[seq_id % len(members)])

    def deliver(self) -> None:
        while self.cluster.reports:
            report = self.cluster.reports.popleft()
            if not self.signals.heard(report, self.now):
                continue
            if isinstance(report, Tokens):
                self.take(report)
                self.signals.committed(report, self.now)
            else:
                self.signals.on_report(report, self.now)

    def take(self, report: Tokens) -> None:
        for token in report.tokens:
            mine = self.owner.get(token.seq_id) == report.rank
            if mine and token.position == len(self.out[token.seq_id]) < LENGTH:
                self.out[token.seq_id].append(token.token_id)

    def step(self) -> None:
        self.now += 0.01
        self.cluster.run_step()
        self.deliver()
        self.signals.tick(self.now)

    # ---- `SequenceOwner`

    busy, trials = True, frozenset[RankId]()

    def unfinished(self) -> tuple[SequenceView, ...]:
        live = ((s, len(o)) for s, o in self.out.items() if len(o) < LENGTH)
        owners = self.owner
        return tuple(SequenceView(s, owners[s], n, s, orphan=owners[s] is None) for s, n in live)

    def reconcile(self, rank: RankId, num_output: dict[SeqId, int]) -> int:
        behind = [s for s, n in num_output.items() if n != len(self.out[s]) < LENGTH]
        for seq_id in behind:
            self.hand_over(seq_id, rank)
        return len(behind)

    def hand_over(self, seq_id: SeqId, to: RankId) -> None:
        self.owner[seq_id] = to
        params = SamplingParams(seed=0, max_tokens=LENGTH)
        self.cluster.send(to, Add(SequenceSpec(seq_id, [1], self.out[seq_id], params, seq_id)))

    def lost(self, rank: RankId, fault: Fault | None) -> None:
        self.owner = {s: None if owner == rank else owner for s, owner in self.owner.items()}

    def met(self) -> None: ...

    def epoch_left(self) -> None: ...

    def planned(self, plan: Continue) -> None: ...

    def epoch_began(self, membership: Membership, record: RecoveryRecord | None) -> None:
        self.assign()

    def failed(self, reason: str) -> int:
        raise AssertionError(reason)


def test_sequences_of_another_host_go_on_after_a_kill() -> None:
    host = ToyHost()
    assert isinstance(host.epochs.state, Serving)
    for seq_id in range(8):
        host.add(seq_id)
    for _ in range(4):
        host.step()
    lost = [s for s, rank in host.owner.items() if rank == 2]
    assert lost
    assert all(len(host.out[s]) == 4 for s in lost)
    host.cluster.kill(RankId(2))
    host.signals.on_exit(RankId(2), Incarnation(1), "killed by signal 9", host.now, by_itself=False)
    for _ in range(LENGTH):
        host.step()
    assert host.epochs.membership.members == (0, 1, 3)
    assert host.epochs.membership.epoch == 2
    assert {host.owner[s] for s in lost} <= {0, 1, 3}
    assert host.out == {SeqId(s): list(range(LENGTH)) for s in range(8)}
    (record,) = host.epochs.records
    assert (record.outcome, record.migrated) == ("recovered", len(lost))
    assert record.stall_s is not None
