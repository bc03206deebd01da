"""Requests on their way to ranks and tokens on their way back: what the epochs see as their host.

Gives sequences to ranks and wakes them, and answers for the sequences (`epochs.ports`).
"""

from collections.abc import Callable, Sequence
from functools import partial

from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.ledger import Ledger
from revivemoe.engine.requests import Arrival, Assigned, LiveRequest, Sink
from revivemoe.engine.suspects import Suspicion
from revivemoe.engine.totals import Totals
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.obligations import Obligation
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.ids import RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.messages.commands import TellHoldings
from revivemoe.messages.events import Convicted, HoldingsMended, Migrated, RequestFailed, Tell
from revivemoe.messages.reports import Heartbeat, Holdings, Tokens
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.world import SequenceView
from revivemoe.streams import Submission

DEADLY = ("process_exit", "heartbeat", "hang", "fence_timeout", "non_finite")
"""Kinds of fault that a request may bring about, for all that is known."""
TRIAL = "trial"
TURN_S = 5.0
"""How long a suspect may wait for a rank that is free of what is new, before one is cleared."""


class Traffic:
    """Owns the ledger. Implements `SequenceOwner`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_model_len: int,
        membership: Membership,
        fleet: Fleet,
        trial_timeout_s: float,
        clock: Callable[[], float],
        tell: Tell,
    ) -> None:
        """`trial_timeout_s`: for a suspect on trial to get on by a token."""
        self.ledger = Ledger(
            vocabulary, max_model_len, fleet.send, fleet.incarnation, self._tell_failed
        )
        self.totals = Totals()
        self._membership, self._fleet, self._tell = membership, fleet, tell
        self._turns: dict[str, bool] = {}
        """Suspects that are owed a turn, and whether they still wait for it."""
        self._trial_timeout_s, self._clock = trial_timeout_s, clock
        self._serving = False
        self._record: RecoveryRecord | None = None
        """Of the last change of epoch."""

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, submission: Submission, sink: Sink) -> LiveRequest:
        """Admit a request. While nobody serves its sequences wait for a rank."""
        request = self.ledger.admit(submission, sink, bool(self._membership.missing))
        self.totals.prompt_tokens += sum(len(p) for p in submission.prompts)
        self.assign()
        return request

    def assign(self) -> None:
        """While serving: give every sequence that waits for a rank to one."""
        if not self._serving or not self.ledger.num_waiting:
            return
        attention = self._membership.attention
        ranks = [r for r in attention if not self._fleet.views[r].draining]
        assigned = self.ledger.assign_waiting(ranks or attention)
        orphans = [one for one in assigned if one.orphan]
        if orphans:
            self._count_moved(orphans)
        if assigned:
            self.wake()

    def tick(self) -> None:
        """A suspect's turn may have come, or have ended, without a token to tell of it."""
        self.assign()
        self._owe_turns(self._clock())

    def wake(self) -> None:
        """Tell all members that there is work."""
        self._fleet.wake(self._membership.members)

    def on_tokens(self, report: Tokens) -> Arrival:
        """A rank has committed a step."""
        gaps = self.ledger.gaps
        arrival = self.ledger.on_tokens(report)
        if self.ledger.gaps > gaps:
            self.wake()  # what was handed over again may have come after the last step
        self.totals.count_tokens(arrival, report.step_s)
        if arrival.released:
            self.assign()
        return arrival

    def on_heartbeat(self, beat: Heartbeat, now: float) -> None:
        """A rank tells what it holds: asked for all of it if that goes on differing."""
        if not self._serving or beat.holdings is None or beat.rank not in self._membership.members:
            return
        owner = (beat.rank, beat.incarnation)
        question = self.ledger.holdings.doubtful(owner, beat.holdings, now)
        if question is not None:
            self._fleet.send(beat.rank, TellHoldings(question))

    def on_holdings(self, report: Holdings) -> None:
        """A rank has answered. While it is fenced it tells more than that."""
        mended = self.ledger.on_holdings(report) if self._serving else 0
        if mended:
            self.totals.mended += mended
            self._tell(HoldingsMended(report.rank, mended))
            self.wake()

    def _tell_failed(self, request_id: str, error: str) -> None:
        self._tell(RequestFailed(request_id, error))

    def tell_migrated(self, moved: Sequence[SeqId]) -> None:
        """Name the requests that go on elsewhere."""
        self._tell(Migrated(self._membership.epoch, self.ledger.request_ids(moved)))

    def _count_moved(self, orphans: Sequence[Assigned]) -> None:
        """Suspects that have lost their rank move one by one, after the recovery itself."""
        tokens = sum(one.num_tokens for one in orphans)
        self.totals.migrated += len(orphans)
        self.totals.recomputed_tokens += tokens
        if self._record is not None:
            self._record.migrated += len(orphans)
            self._record.recomputed_tokens += tokens
        self.tell_migrated([one.seq_id for one in orphans])

    # ---- `SequenceOwner` ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.ledger.num_unfinished > 0

    @property
    def trials(self) -> frozenset[RankId]:
        return self.ledger.suspects.trials

    def unfinished(self) -> tuple[SequenceView, ...]:
        return self.ledger.unfinished()

    def reconcile(self, rank: RankId, num_output: dict[SeqId, int]) -> int:
        return self.ledger.reconcile(rank, num_output)

    def hand_over(self, seq_id: SeqId, to: RankId) -> None:
        self.ledger.hand_over(seq_id, to)

    def lost(self, rank: RankId, fault: Fault | None) -> None:
        """Its sequences need another rank; those that may have brought it down are tried."""
        victims = self.ledger.orphan(rank)
        signature = "" if fault is None else fault.signature
        died = fault is not None and fault.kind in DEADLY
        convicted = self.ledger.suspects.lost(rank, victims, signature, died)
        if convicted is None or fault is None:
            return
        self.totals.convicted += 1
        self._tell(Convicted(convicted.submission.request_id, fault.detail))
        self.ledger.convict(
            convicted,
            "this request was running at two faults of the same kind, the second time alone: "
            f"it is ended to protect the others (rank {rank}: {fault.detail})",
        )

    def _owe_turns(self, now: float) -> None:
        """A suspect is tried within a bound, and cleared within another one: from then on."""
        owed, obligations = self._turns, self._fleet.lives.obligations
        self._turns = {}
        for suspicion in self.ledger.suspects.all():
            request, waits = suspicion.request, suspicion.trial is None
            who = f"{request.submission.request_id}#{request.arrival}"
            self._turns[who] = waits
            if owed.pop(who, None) == waits and obligations.owed(TRIAL, who):
                continue
            then = "room is made for it on a rank" if waits else "it is cleared"
            due = now + (TURN_S if waits else self._trial_timeout_s)
            lapse = partial(self._see_to_turn, suspicion)
            obligations.owe(Obligation(TRIAL, who, now, due, then, lapse))
        for who in owed:
            obligations.met(TRIAL, who)

    def _see_to_turn(self, suspicion: Suspicion, now: float) -> None:
        if suspicion.trial is not None:
            self.ledger.suspects.clear(suspicion.request)
        elif suspicion.reserved is not None and self._serving:
            self.ledger.make_room(suspicion.reserved)
        self.tick()

    def met(self) -> None:
        self.ledger.run(True)

    def epoch_left(self) -> None:
        self._serving = False
        self.ledger.run(False)
        self.ledger.holdings.forget_doubts()

    def planned(self, plan: Continue) -> None:
        self.totals.migrated += len(plan.migrations)
        self.totals.recomputed_tokens += sum(move.num_tokens for move in plan.migrations)
        if plan.membership.missing:
            self.ledger.mark_degraded()
        self.tell_migrated([move.seq_id for move in plan.migrations])

    def epoch_began(self, membership: Membership, record: RecoveryRecord | None) -> None:
        self._membership, self._record, self._serving = membership, record, True
        self.ledger.run(True)
        if membership.missing:
            self.ledger.mark_degraded()
        self.assign()

    def failed(self, reason: str) -> int:
        self._serving = False
        return self.ledger.fail_all(f"the instance has failed: {reason}", 503)
