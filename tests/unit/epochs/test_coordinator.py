"""The coordinator over ranks and sequences that only keep notes: events in, commands out."""

from collections.abc import Sequence
from typing import Any

import pytest
from unit.memberships import membership, placed, ranks

from revivemoe.epochs.coordinator import Coordinator
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.epochs.stages import Failed, Fencing, Finished, Idle, Recovered, Resuming
from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, place
from revivemoe.membership.topology import Topology
from revivemoe.messages.commands import Command, Configure, DomainSpec, Fence
from revivemoe.messages.events import Configured, Event, Fenced
from revivemoe.messages.reports import FenceAck, Resumed
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.world import SequenceView, World

DOMAIN = DomainSpec("shm")
POLICY = Policy(fence_timeout_s=10, resume_timeout_s=20)


class Host:
    """Both ports of `epochs.ports`, and the world as a host engine would describe it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.members = membership(place(8, [0], ranks(0, 1, 2, 3), redundant=8))
        self.owners: dict[SeqId, RankId | None] = {}
        self.log: list[tuple[Any, ...]] = []
        self.mended = 0
        self.told: list[Event] = []
        self.coordinator = Coordinator(
            self, self.restart, self, POLICY, lambda: self.now, self.told.append
        )

    def keep_all_on(self, *survivors: int) -> None:
        """So that no expert is lost with the others: their slots are empty."""
        kept = place(8, [0], ranks(*survivors))
        nothing = ((EMPTY,) * kept.slots_per_rank,)
        self.members = membership(
            placed(dict.fromkeys(self.members.experts, nothing) | kept.slots, 8, kept.layers)
        )

    # RankPort
    def send(self, rank: RankId, command: Command) -> None:
        self.log.append((type(command).__name__, rank, command))

    def restart(self, rank: RankId) -> None:
        self.log.append(("restart", rank))

    # SequenceOwner
    busy = True
    trials: frozenset[RankId] = frozenset()

    def lost(self, rank: RankId, fault: Fault | None) -> None:
        self.log.append(("lost", rank, fault))

    def planned(self, plan: Continue) -> None:
        self.log.append(("planned", plan))

    def met(self) -> None:
        self.log.append(("met",))

    def epoch_left(self) -> None:
        self.log.append(("epoch_left",))

    def epoch_began(self, membership: Membership, record: RecoveryRecord | None) -> None:
        self.log.append(("epoch_began", membership, record))

    def failed(self, reason: str) -> int:
        self.log.append(("failed", reason))
        return 0

    def unfinished(self) -> tuple[SequenceView, ...]:
        return tuple(SequenceView(s, o, 10, s) for s, o in self.owners.items())

    def reconcile(self, rank: RankId, num_output: dict[SeqId, int]) -> int:
        self.log.append(("reconcile", rank, num_output))
        return self.mended

    def hand_over(self, seq_id: SeqId, to: RankId) -> None:
        self.owners[seq_id] = to
        self.log.append(("hand_over", seq_id, to))

    # what the host engine does
    def begin(self, *dead: int) -> None:
        faults = [Fault(RankId(r), "process_exit", f"{r}", detect_s=r / 10) for r in dead]
        self.accuse(faults)

    def accuse(self, faults: Sequence[Fault]) -> None:
        self.coordinator.begin(self.members, faults, self.now)

    def ack(self, rank: int, epoch: int, next_step: int = 0, **held: int) -> Finished | None:
        num_output = {SeqId(int(k[1:])): v for k, v in held.items()}
        self.coordinator.on_ack(
            FenceAck(RankId(rank), Incarnation(1), Epoch(epoch), next_step, num_output, True, 0.125)
        )
        return self.coordinator.proceed(self.world, DOMAIN, wake=5)

    def resumed(self, rank: int, epoch: int) -> Finished | None:
        report = Resumed(RankId(rank), Incarnation(1), Epoch(epoch), 0, domain_s=0.25)
        return self.coordinator.on_resumed(report, self.now)

    def world(self) -> World:
        return World(self.members, self.unfinished(), True, 0)

    def commands(self, kind: str) -> list[tuple[RankId, Any]]:
        return [(entry[1], entry[-1]) for entry in self.log if entry[0] == kind]

    def to(self, kind: str) -> list[int]:
        return [rank for rank, _ in self.commands(kind)]


@pytest.fixture
def host() -> Host:
    return Host()


def recovered(finished: Finished | None) -> Recovered:
    assert isinstance(finished, Recovered), finished
    return finished


def test_the_whole_way(host: Host) -> None:
    coordinator = host.coordinator
    host.owners = {SeqId(0): RankId(0), SeqId(1): RankId(2), SeqId(2): None}
    assert not coordinator.active
    host.begin(2)
    assert coordinator.active
    assert host.commands("Fence") == [(r, Fence(Epoch(2))) for r in (0, 1, 3)]
    host.log.clear()

    host.now += 0.5
    assert host.ack(0, 2, next_step=7, s0=4) is None
    assert host.ack(1, 2, next_step=8) is None
    assert host.log == [], "one survivor has not acknowledged"
    assert coordinator.plan is None
    assert host.ack(3, 2, next_step=7) is None
    assert [entry[0] for entry in host.log] == [
        "reconcile", "reconcile", "reconcile", "hand_over", "Configure", "Configure", "Configure"
    ]  # fmt: skip
    assert host.log[0] == ("reconcile", 0, {SeqId(0): 4})
    assert host.log[3] == ("hand_over", 1, 1)
    configure = host.commands("Configure")[0][1]
    assert configure == Configure(
        step=8,
        membership=Membership(
            Topology(Epoch(2), (0, 1, 3), (0, 1, 3), (0, 1, 3)),
            host.members.placement.without(frozenset({RankId(2)})),
        ),
        domain=DOMAIN,
        wake=5,
    )
    assert coordinator.plan is not None

    host.now += 0.5
    assert host.resumed(0, 2) is None
    assert host.resumed(1, 2) is None
    finished = recovered(host.resumed(3, 2))
    assert not coordinator.active
    assert finished.plan.membership == configure.membership
    record = finished.record
    assert (record.epoch, record.cause, record.outcome) == (2, "process_exit", "recovered")
    assert (record.migrated, record.recomputed_tokens, record.experts_dropped) == (1, 10, 4)
    assert record.detect_s == 0.2
    assert record.reason
    assert host.told == [
        Fenced(Epoch(2), "process_exit", [RankId(2)], survivors=3, at_boundary=False),
        Configured(Epoch(2), record.reason, migrated=1),
    ]
    assert record.phases == {
        "fence": 0.375, "rollback": 0.125, "plan": 0, "migrate": 0, "experts": 0,
        "domain": 0.25, "graphs": 0, "resume": 0.25,
    }  # fmt: skip


def test_the_accused_is_never_waited_for(host: Host) -> None:
    host.begin(0, 1, 2)
    host.keep_all_on(3)
    host.ack(3, 2)
    assert host.to("Configure") == [3]
    recovered(host.resumed(3, 2))


def test_steps_never_go_back(host: Host) -> None:
    host.begin(3)
    host.ack(0, 2, next_step=9)
    host.begin(0)  # the one that was ahead dies
    host.keep_all_on(1, 2)
    for rank in (1, 2):
        host.ack(rank, 3, next_step=8)
    assert host.commands("Configure")[0][1].step == 9


def test_epochs_never_come_again(host: Host) -> None:
    """The topology's epoch only moves when a recovery ends well."""
    for epoch in (2, 3, 4):
        host.accuse([])
        assert {command.epoch for _, command in host.commands("Fence")[-4:]} == {epoch}


# ---- a fault in each stage ------------------------------------------------------------------


def test_when_nobody_is_accused_the_cause_is_communication(host: Host) -> None:
    host.begin()
    assert host.to("Fence") == [0, 1, 2, 3]
    for rank in range(4):
        host.ack(rank, 2, next_step=3 + rank % 2)
    assert host.commands("Configure")[0][1].step == 4
    results = [host.resumed(rank, 2) for rank in range(4)]
    assert recovered(results[-1]).record.cause == "communication"


def test_a_fault_during_the_fence_starts_again_with_both(host: Host) -> None:
    host.begin(2)
    host.ack(0, 2)
    host.now += 1
    host.log.clear()
    host.begin(0)
    assert host.commands("Fence") == [(r, Fence(Epoch(3))) for r in (1, 3)]
    record = host.coordinator.record
    assert [f.rank for f in record.faults] == [2, 0]
    assert record.started == 100.0, "one recovery: it began with the first fault"
    host.keep_all_on(1, 3)
    host.ack(1, 3)
    host.ack(3, 3)
    assert host.commands("Configure")[0][1].membership.members == (1, 3)
    host.resumed(1, 3)
    assert recovered(host.resumed(3, 3)).record.epoch == 3


def test_a_fault_while_resuming_starts_again_with_both(host: Host) -> None:
    host.owners = {SeqId(0): RankId(2), SeqId(1): RankId(2), SeqId(2): RankId(2)}
    host.begin(2)
    for rank in (0, 1, 3):
        host.ack(rank, 2)
    moved = dict(host.owners)
    assert sorted(moved.values()) == [0, 1, 3]
    host.resumed(0, 2)
    host.log.clear()
    host.begin(1)
    assert host.commands("Fence") == [(r, Fence(Epoch(3))) for r in (0, 3)]
    host.keep_all_on(0, 3)
    assert host.resumed(3, 2) is None, "of the epoch that was given up"
    host.ack(0, 3)
    host.ack(3, 3)
    assert [entry[1] for entry in host.log if entry[0] == "hand_over"] == [
        seq for seq, owner in moved.items() if owner == 1
    ]
    assert host.resumed(0, 3) is None
    assert host.resumed(3, 2) is None, "still of the epoch that was given up"
    record = recovered(host.resumed(3, 3)).record
    assert [f.rank for f in record.faults] == [2, 1]
    assert (record.migrated, record.recomputed_tokens) == (4, 40), "both attempts' moves"


def test_a_second_accusation_of_the_same_rank_adds_nothing(host: Host) -> None:
    host.begin(2)
    host.begin(2)
    assert [f.rank for f in host.coordinator.record.faults] == [2]


def test_the_last_survivor_dies_too(host: Host) -> None:
    host.begin(0, 1, 2)
    host.begin(3)
    finished = host.coordinator.proceed(host.world, DOMAIN, wake=0)
    assert isinstance(finished, Failed)
    assert "no attention rank is left" in finished.reason
    assert (finished.record.outcome, finished.record.reason) == ("failed", finished.reason)
    assert not host.coordinator.active


def test_what_the_policy_does_not_cover_configures_nobody(host: Host) -> None:
    host.members = membership(place(8, [0], host.members.experts))
    host.begin(2)
    host.ack(0, 2)
    host.ack(1, 2)
    finished = host.ack(3, 2)
    assert isinstance(finished, Failed)
    assert "25.0% of a layer's experts" in finished.reason
    assert host.to("Configure") == []
    assert isinstance(host.coordinator.state, Idle)


# ---- late and stale -------------------------------------------------------------------------


def test_stale_acknowledgements_count_for_nothing(host: Host) -> None:
    host.begin(2)
    host.begin(1)
    assert host.ack(0, 2, next_step=50) is None
    assert host.ack(3, 2, next_step=50) is None
    assert host.to("Configure") == []
    assert host.ack(0, 3, next_step=1) is None
    assert host.ack(1, 3, next_step=70) is None, "an accused rank's"
    assert host.ack(0, 3, next_step=90) is None, "a second one"
    assert isinstance(host.coordinator.state, Fencing)
    host.keep_all_on(0, 3)
    host.ack(3, 3, next_step=2)
    assert host.commands("Configure")[0][1].step == 2


def test_an_acknowledgement_after_the_fact_configures_nobody_twice(host: Host) -> None:
    host.begin(2)
    for rank in (0, 1, 3):
        host.ack(rank, 2)
    assert host.ack(0, 2) is None
    assert len(host.to("Configure")) == 3
    for rank in (0, 1, 3):
        host.resumed(rank, 2)
    assert host.ack(0, 2) is None
    assert host.resumed(0, 2) is None
    assert not host.coordinator.active


def test_the_first_that_has_met_all_others_proves_that_all_have_met(host: Host) -> None:
    host.begin(2)
    for rank in (0, 1, 3):
        host.ack(rank, 2)
    assert ("met",) not in host.log
    for rank in (1, 0, 0, 3):
        host.resumed(rank, 2)
        assert host.log.count(("met",)) == 1


def test_the_same_member_twice_is_one(host: Host) -> None:
    host.begin(2)
    for rank in (0, 1, 3):
        host.ack(rank, 2)
    for _ in range(3):
        assert host.resumed(0, 2) is None
    assert host.resumed(2, 2) is None, "the dead rank's"
    assert isinstance(host.coordinator.state, Resuming)


def test_resuming_before_the_fence_is_over_means_nothing(host: Host) -> None:
    host.begin(2)
    for rank in (0, 1, 3):
        assert host.resumed(rank, 2) is None
    assert isinstance(host.coordinator.state, Fencing)


# ---- deadlines ------------------------------------------------------------------------------


def test_no_recovery_is_never_overdue(host: Host) -> None:
    assert host.coordinator.overdue(1e9) is None


def test_survivors_that_do_not_acknowledge_are_accused(host: Host) -> None:
    host.begin(2)
    host.ack(1, 2)
    assert host.coordinator.overdue(109.9) is None
    overdue = host.coordinator.overdue(110.0)
    assert overdue is not None
    assert [(f.rank, f.kind) for f in overdue] == [(0, "fence_timeout"), (3, "fence_timeout")]
    host.now = 110.0
    host.accuse(overdue)
    assert host.coordinator.overdue(119.9) is None, "the fence that starts again has its own time"
    host.keep_all_on(1)
    host.ack(1, 3)
    assert {f.kind for f in recovered(host.resumed(1, 3)).record.faults} == {
        "process_exit",
        "fence_timeout",
    }


def test_when_the_resume_stage_is_late_all_wait_for_one_so_nobody_is_accused(host: Host) -> None:
    host.begin(2)
    for rank in (0, 1, 3):
        host.ack(rank, 2)
    host.resumed(0, 2)
    assert host.coordinator.overdue(119.9) is None
    assert host.coordinator.overdue(120.0) == []


def test_a_stall_of_the_engine_moves_the_deadline(host: Host) -> None:
    host.begin(2)
    host.coordinator.postpone(5.0)
    assert host.coordinator.overdue(114.9) is None
    assert host.coordinator.overdue(115.0) is not None


def test_mended_sequences_are_counted(host: Host) -> None:
    host.mended = 2
    host.begin(2)
    for rank in (0, 1, 3):
        host.ack(rank, 2)
    assert host.coordinator.record.reconciled == 6
