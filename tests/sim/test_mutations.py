"""The simulation is only worth what it catches: deliberate breakages, each of which it must see.

Each breaks one rule of the engine or of a rank's state machine by a monkeypatch, and is looked for
in a bounded number of seeds. The seed that sees it passes without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from revivemoe.core import digest
from revivemoe.core.blocks import BlockPool
from revivemoe.core.digest import Digest
from revivemoe.core.effects import Enter, Load, Loaded
from revivemoe.core.journal import Preempted, _Undo
from revivemoe.core.loop import StepLoop
from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.engine.device_signals import DeviceSignals, Signal
from revivemoe.engine.engine import Engine
from revivemoe.engine.holdings import Holdings
from revivemoe.engine.ledger import Ledger
from revivemoe.engine.returns import Returns
from revivemoe.engine.token_log import TokenLog
from revivemoe.epochs.coordinator import Coordinator
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.lives import Lives
from revivemoe.epochs.loads import Loads
from revivemoe.epochs.rank_life import Condemned, Leaving, Loading
from revivemoe.epochs.rank_view import RankView
from revivemoe.epochs.signals import Signals
from revivemoe.epochs.stages import Fencing
from revivemoe.ids import BlockId, Epoch, RankId, SeqId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.membership import Membership
from revivemoe.membership.topology import Topology
from revivemoe.messages.commands import Configure, Wake
from revivemoe.messages.reports import FenceAck, Heartbeat, Report, StepAborted, Tokens
from revivemoe.recovery import role_switch
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import Fault
from revivemoe.sim.faults import FaultKind
from revivemoe.sim.run import run_seed

MOST_SEEDS = 60
Patch = pytest.MonkeyPatch
PROCESS: tuple[FaultKind, ...] = ("kill", "error", "kill-two", "zombie")
CUTS: tuple[FaultKind, ...] = ("link", "retries", "kill")
SWITCHES: tuple[FaultKind, ...] = ("kill", "switch", "kill-switching", "load-fails", "kill-two")
ANY: tuple[FaultKind, ...] = (*PROCESS, *CUTS, "hang", "nan", "stall", "drain")


# ---- core -----------------------------------------------------------------------------------


def skip_rollback(patch: Patch) -> None:
    def roll_back(self: Rank) -> bool:
        if not isinstance(self.state, InDomain) or self.state.open is None:
            return False
        self.journal.clear()
        self.state = replace(self.state, open=None)
        return True

    patch.setattr(Rank, "roll_back", roll_back)


def keep_evicted_names(patch: Patch) -> None:
    """A block that was overwritten gets the name of its old content back."""
    undo = BlockPool.undo_allocate
    evicted_of: dict[tuple[int, BlockId], Digest | None] = {}
    allocate = BlockPool.allocate

    def remember(self: BlockPool) -> tuple[BlockId, Digest | None]:
        block, evicted = allocate(self)
        evicted_of[id(self), block] = evicted
        return block, evicted

    def give_back(self: BlockPool, block: BlockId, evicted: Digest | None) -> None:
        undo(self, block, evicted or evicted_of.pop((id(self), block), None))

    patch.setattr(BlockPool, "allocate", remember)
    patch.setattr(BlockPool, "undo_allocate", give_back)


def keep_overwritten_kv(patch: Patch) -> None:
    """A preempted sequence whose blocks were overwritten counts as computed after the undo."""
    readmit = _Undo._readmit

    def as_if_nothing(self: _Undo, record: Preempted) -> None:
        self._overwritten.clear()
        readmit(self, record)

    patch.setattr(_Undo, "_readmit", as_if_nothing)


def drop_mask_key(patch: Patch) -> None:
    """Prefix names do not say under which mask the KV was computed."""
    root = digest._root(b"")
    patch.setattr(digest, "_root", lambda mask_key: root)


def lose_kv_at_fence(patch: Patch) -> None:
    fence = Rank.fence

    def forgetful(self: Rank, epoch: Any) -> FenceAck | None:
        ack = fence(self, epoch)
        for sequence in list(self.queues.running):
            self.journal.preempt(sequence)
        self.journal.clear()
        return ack

    patch.setattr(Rank, "fence", forgetful)


# ---- engine and ledger ----------------------------------------------------------------------


def drop_tokens_of_the_old_epoch(patch: Patch) -> None:
    on_report = Engine.on_report

    def strict(self: Engine, report: Report, now: float) -> None:
        stale = isinstance(report, Tokens) and (
            self.epochs.coordinator.active or report.epoch != self.membership.epoch
        )
        if not stale:
            on_report(self, report, now)

    patch.setattr(Engine, "on_report", strict)


def accept_old_processes(patch: Patch) -> None:
    patch.setattr(Fleet, "heard", lambda self, report, now: report.rank in self.views)


def accuse_the_reporter(patch: Patch) -> None:
    def on_symptom(self: Signals, report: StepAborted, now: float) -> None:
        self._epochs.accuse([Fault(report.rank, "communication", report.detail)], now)

    patch.setattr(Signals, "_on_symptom", on_symptom)


def wake_owners_only(patch: Patch) -> None:
    def wake(self: Fleet, members: Sequence[RankId]) -> None:
        self.wakes += 1
        self.send(members[0], Wake(self.wakes))

    patch.setattr(Fleet, "wake", wake)


def hand_over_without_owner(patch: Patch) -> None:
    """Nobody may report tokens of a sequence that was handed over."""
    hand_over = Ledger.hand_over

    def forgetful(self: Ledger, seq_id: SeqId, to: RankId) -> None:
        hand_over(self, seq_id, to)
        if self._sequences[seq_id].log.output_ids:
            self._sequences[seq_id].owner = None

    patch.setattr(Ledger, "hand_over", forgetful)


def wake_counter_stands_still(patch: Patch) -> None:
    """Every wake looks like the first one."""

    def wake(self: Fleet, members: Sequence[RankId]) -> None:
        self.wakes = 1
        self.broadcast(members, Wake(1))

    patch.setattr(Fleet, "wake", wake)


def append_from_anybody_anywhere(patch: Patch) -> None:
    """The log takes every token as the next, from whoever reports it."""
    append = TokenLog.append

    def trusting(self: TokenLog, position: int, token_id: int, logprobs: Any = None) -> Any:
        return append(self, len(self.output_ids), token_id, logprobs)

    patch.setattr(TokenLog, "append", trusting)
    patch.setattr(Ledger, "_owned", lambda self, seq_id, owner: self._sequences.get(seq_id))


def forget_orphans(patch: Patch) -> None:
    patch.setattr(Ledger, "orphan", lambda self, rank: [])


# ---- recovery -------------------------------------------------------------------------------


def plan_before_all_are_fenced(patch: Patch) -> None:
    def fenced(self: Coordinator) -> bool:
        return isinstance(self.state, Fencing) and bool(self.state.acks) and not self.state.hold

    patch.setattr(Coordinator, "fenced", property(fenced))


def step_of_the_last_to_answer(patch: Patch) -> None:
    on_ack = Coordinator.on_ack

    def last(self: Coordinator, ack: FenceAck) -> None:
        on_ack(self, ack)
        self._step = ack.next_step

    patch.setattr(Coordinator, "on_ack", last)


def waiting_is_working(patch: Patch) -> None:
    """A rank that waits for its peers is held to be hung."""
    beat = Detector.beat

    def blunt(self: Detector, heartbeat: Heartbeat) -> None:
        if heartbeat.activity.kind == "waiting":
            working = msgspec.structs.replace(heartbeat.activity, kind="working", budget_s=0.01)
            heartbeat = msgspec.structs.replace(heartbeat, activity=working)
        beat(self, heartbeat)

    patch.setattr(Detector, "beat", blunt)


# ---- roles ----------------------------------------------------------------------------------


def members_in_their_old_roles(patch: Patch) -> None:
    """Whoever has switched counts as the attention rank it was at the start."""
    patch.setattr(Fleet, "roles", lambda self, home: home)


def keep_what_it_held(patch: Patch) -> None:
    """A rank that becomes an expert rank keeps its sequences and blocks."""
    patch.setattr(Rank, "give_up_attention", lambda self: None)


def the_last_one_may_go(patch: Patch) -> None:
    """The last attention rank can be made an expert rank."""

    def anybody(topology: Topology) -> tuple[RankId, ...]:
        return tuple(r for r in topology.attention if r not in topology.experts)

    patch.setattr(role_switch, "donors", anybody)


def shards_are_for_ever(patch: Patch) -> None:
    """Nobody loads the shards of a dense layer when no group is left."""
    patch.setattr(DenseGroups, "completed", lambda self, attention: self)


# ---- the step loop itself -------------------------------------------------------------------


def acknowledge_before_the_claim(patch: Patch) -> None:
    """Whose numbers were broken is said behind the acknowledgement: too late for the plan."""
    leave, leave_for = StepLoop._leave, StepLoop._leave_for
    held: dict[int, list[Report]] = {}

    def hold_back(self: StepLoop) -> Any:
        report = self._report
        self._report = held.setdefault(id(self), []).append
        departure = yield from leave(self)
        self._report = report
        return departure

    def tell_late(self: StepLoop, epoch: Epoch) -> Any:
        yield from leave_for(self, epoch)
        for claim in held.pop(id(self), []):
            self._report(claim)

    patch.setattr(StepLoop, "_leave", hold_back)
    patch.setattr(StepLoop, "_leave_for", tell_late)


def enter_before_load(patch: Patch) -> None:
    """A rank meets the others in the new domain, and loads what it is to serve afterwards."""
    configure = StepLoop._configure

    def hasty(self: StepLoop, command: Configure) -> Any:
        steps, load, answer = configure(self, command), None, None
        for_load = Loaded(0.0, 0, {})
        try:
            effect = next(steps)
            while True:
                if isinstance(effect, Load):
                    load, answer = effect, for_load
                else:
                    answer = yield effect
                    if isinstance(effect, Enter) and load is not None:
                        yield load
                effect = steps.send(answer)
        except StopIteration:
            pass

    patch.setattr(StepLoop, "_configure", hasty)


def resumed_before_the_agreement(patch: Patch) -> None:
    """A rank says that all are there as soon as it has entered the domain itself."""
    configure = StepLoop._configure

    def hasty(self: StepLoop, command: Configure) -> Any:
        yield from configure(self, command)
        self._report_resumed()

    patch.setattr(StepLoop, "_configure", hasty)


def fence_without_leaving(patch: Patch) -> None:
    """A rank acknowledges a fence, and stays in the domain it was to leave."""

    def stay(self: StepLoop, epoch: Epoch) -> Any:
        ack = self._rank.fence(epoch)
        if ack is not None:
            self._report(ack)
        return
        yield

    patch.setattr(StepLoop, "_leave_for", stay)


def commit_what_was_cut(patch: Patch) -> None:
    """A step that a fence has cut is left open, as if it could go on in the next epoch."""
    patch.setattr(Rank, "roll_back", lambda self: False)


# ---- lives and obligations: each mend taken out ------------------------------------------------


def kill_only_what_is_there(patch: Patch) -> None:
    """C3: a process that comes into being after its sentence lives on."""
    on_arrived = Lives.on_arrived

    def spare(self: Lives, rank: RankId, incarnation: Any, pid: int, now: float) -> None:
        kill, self._cluster.kill = self._cluster.kill, lambda rank: None  # type: ignore[method-assign]
        on_arrived(self, rank, incarnation, pid, now)
        self._cluster.kill = kill  # type: ignore[method-assign]

    patch.setattr(Lives, "on_arrived", spare)


def give_corpses_up_for_good(patch: Patch) -> None:
    """C1: a process that takes long to die is not replaced when it has died."""
    on_exit = Lives.on_exit

    def forgetful(self: Lives, view: RankView, now: float) -> None:
        if isinstance(view.life, Condemned) and now - view.life.since > 1.0:
            self.obligations.met("launch", view.rank)
            return
        on_exit(self, view, now)

    patch.setattr(Lives, "on_exit", forgetful)


def loads_are_owed_for_ever(patch: Patch) -> None:
    """C2: a load beside the steps that is never answered."""
    patch.setattr(Loads, "_owe", lambda self, request, rank, now: None)


def starts_are_owed_for_ever(patch: Patch) -> None:
    """C2: a process that never says that it is ready."""
    lapsed = Lives._lapsed

    def patient(self: Lives, view: RankView, now: float) -> None:
        if not isinstance(view.life, Loading):
            lapsed(self, view, now)

    patch.setattr(Lives, "_lapsed", patient)


def leavers_may_stay(patch: Patch) -> None:
    """C3: a process that does not stop when told to."""
    lapsed = Lives._lapsed

    def patient(self: Lives, view: RankView, now: float) -> None:
        if not isinstance(view.life, Leaving):
            lapsed(self, view, now)

    patch.setattr(Lives, "_lapsed", patient)


def nothing_comes_back(patch: Patch) -> None:
    """C5."""
    patch.setattr(Returns, "tick", lambda self, now: None)


def plan_from_the_map(patch: Patch) -> None:
    """C6: what ranks say that they hold is not asked."""
    patch.setattr(Membership, "holding", lambda self, tables: self)


def never_compare_holdings(patch: Patch) -> None:
    """C8: a lost last token."""
    patch.setattr(Holdings, "doubtful", lambda self, owner, told, now: None)


def a_fault_outlives_its_process(patch: Patch) -> None:
    """What was wrong with the last process of a rank is held against the next one."""
    patch.setattr(Coordinator, "renewed", lambda self, rank: None)


def weigh_ranks_one_by_one(patch: Patch) -> None:
    """D2: what is said of several ranks is held to be affordable if each of them is."""
    together = DeviceSignals._cannot_do_without

    def each(self: DeviceSignals, signal: Signal, members: list[RankId]) -> str | None:
        return together(self, replace(signal, ranks=(members[0],)), members[:1])

    patch.setattr(DeviceSignals, "_cannot_do_without", each)


LIVES: list[tuple[Callable[[Patch], None], tuple[FaultKind, ...]]] = [
    (kill_only_what_is_there, ("launch-late", "kill")),
    (give_corpses_up_for_good, ("zombie", "kill-two")),
    (loads_are_owed_for_ever, ("load-silent", "kill", "restore")),
    (starts_are_owed_for_ever, ("load-endless",)),
    (leavers_may_stay, ("deaf",)),
    (nothing_comes_back, ("kill",)),
    (plan_from_the_map, ("kill", "kill-two")),
    (never_compare_holdings, ("lost-tokens",)),
    (a_fault_outlives_its_process, ("kill", "stop", "load-endless")),
    (weigh_ranks_one_by_one, ("health-node", "kill")),
]

MUTATIONS: list[tuple[Callable[[Patch], None], tuple[FaultKind, ...]]] = [
    (skip_rollback, CUTS),
    (keep_evicted_names, ("retries",)),
    (keep_overwritten_kv, ("retries",)),
    (drop_mask_key, PROCESS),
    (lose_kv_at_fence, CUTS),
    (drop_tokens_of_the_old_epoch, CUTS),
    (accept_old_processes, PROCESS),
    (accuse_the_reporter, CUTS),
    (wake_owners_only, ANY),
    (wake_counter_stands_still, ANY),
    (forget_orphans, PROCESS),
    (hand_over_without_owner, PROCESS),
    (append_from_anybody_anywhere, ("drain",)),
    (plan_before_all_are_fenced, ANY),
    (step_of_the_last_to_answer, CUTS),
    (waiting_is_working, ("hang",)),
    (members_in_their_old_roles, SWITCHES),
    (keep_what_it_held, SWITCHES),
    (the_last_one_may_go, SWITCHES),
    (shards_are_for_ever, PROCESS),
    (acknowledge_before_the_claim, ("nan-twice",)),
    (enter_before_load, PROCESS),
    (resumed_before_the_agreement, ANY),
    (fence_without_leaving, CUTS),
    (commit_what_was_cut, CUTS),
    *LIVES,
]


FROM = {
    "keep_overwritten_kv": 112, "plan_from_the_map": 135, "wake_owners_only": 38,
    "give_corpses_up_for_good": 45, "shards_are_for_ever": 21, "drop_mask_key": 17,
    "forget_orphans": 11, "plan_before_all_are_fenced": 11, "keep_evicted_names": 9,
    "hand_over_without_owner": 3,
}  # fmt: skip
"""Where the seeds begin, if not at 0: few of them strike at the right moment."""


def first_seen(kinds: tuple[FaultKind, ...], start: int) -> int | None:
    """The first seed that breaks a rule."""
    seeds = range(start, start + MOST_SEEDS)
    return next((seed for seed in seeds if run_seed(seed, kinds).violation is not None), None)


@pytest.mark.parametrize(
    ("mutate", "kinds"), [pytest.param(m, k, id=m.__name__) for m, k in MUTATIONS]
)
def test_a_mutation_is_caught(
    mutate: Callable[[Patch], None], kinds: tuple[FaultKind, ...], monkeypatch: Patch
) -> None:
    with monkeypatch.context() as patch:
        mutate(patch)
        seed = first_seen(kinds, FROM.get(mutate.__name__, 0))
    assert seed is not None, f"{MOST_SEEDS} seeds do not see this mutation"
    assert run_seed(seed, kinds).violation is None, "without the mutation this seed must pass"
