"""What is seen of the ranks, and what it means: reports, exits, and the passing of time.

A communication error is a symptom; only the detector, an exit or a missed deadline names a rank.
What is to be done about it is not decided here (`epochs`).
"""

import logging
from dataclasses import replace
from typing import assert_never

from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.stages import Restarting
from revivemoe.epochs.start import StartUp
from revivemoe.epochs.state import FailedState, Paused, Recovering, Serving, Starting
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages import events, reports
from revivemoe.recovery.faults import Fault

log = logging.getLogger("revivemoe.epochs")


class Signals:
    """Takes in what ranks say and do."""

    def __init__(self, epochs: Epochs, start_timeout_s: float, tell: events.Tell) -> None:
        self._epochs, self._fleet, self._tell = epochs, epochs.fleet, tell
        self._start_up = StartUp(epochs.fleet, epochs.membership.members, start_timeout_s)
        self.last_step = 0
        self.symptoms = 0
        """Steps aborted by communication, so far."""

    # ---- time --------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Launch every rank."""
        self._start_up.begin(now)

    def tick(self, now: float) -> bool:
        """Judge deadlines. Returns whether nobody was accused, and the instance is past its start:
        then the host may see to what else is due.
        """
        match self._epochs.state:
            case Starting():
                self._look_at_start(now)
            case Serving() | Recovering() | Paused():
                return self._judge(now)
            case FailedState():
                pass
            case _:
                assert_never(self._epochs.state)
        return False

    def postpone(self, seconds: float) -> None:
        """The host itself stood still for so long: nobody else is late by that."""
        self._epochs.coordinator.postpone(seconds)
        self._fleet.postpone(seconds)
        self._epochs.symptoms.postpone(seconds)

    def _judge(self, now: float) -> bool:
        if isinstance(self._epochs.state, Recovering) and not self._epochs.coordinator.active:
            self._epochs.redo("internal", now)  # an exception has left it without a stage
        for _ in range(len(self._fleet.lives.obligations)):
            if not self._fleet.lives.obligations.see_to_one(now):
                break
            if isinstance(self._epochs.state, FailedState):
                return False
        if faults := self._fleet.judge(now):
            self._epochs.accuse(faults, now)
        elif (overdue := self._epochs.coordinator.overdue(now)) is not None:
            self._overdue(overdue, now)
        elif self._epochs.symptoms.unexplained(now):
            self._blame_link(now)
        else:
            return True
        return False

    def _look_at_start(self, now: float) -> None:
        if (reason := self._start_up.failure(now)) is not None:
            self._epochs.fail(reason)

    def _overdue(self, faults: list[Fault], now: float) -> None:
        """A stage has missed its deadline: begin again from the fence, which is a new attempt."""
        if self._epochs.coordinator.plan is not None:
            self._epochs.attempts.domain_failures += 1
        if isinstance(self._epochs.coordinator.state, Restarting):
            detail = f"it was not ready within {self._epochs.policy.restart_timeout_s:.0f} s"
            late = [v.rank for v in self._fleet.views.values() if v.loading]
            faults = [Fault(rank, "start_timeout", detail) for rank in late]
        if self._epochs.coordinator.planned:
            self._epochs.redo(self._epochs.coordinator.record.cause, now, asked=True)
            return
        self._epochs.attempts.again(now)
        self._epochs.accuse(faults, now)

    def _blame_link(self, now: float) -> None:
        """Communication failed and nobody is accused: a new domain, or one of the two goes."""
        if self._epochs.coordinator.active:
            self._epochs.attempts.again(now)
            self._epochs.attempts.domain_failures += self._epochs.coordinator.plan is not None
        self._epochs.accuse(self._epochs.symptoms.blame(now), now)

    # ---- what ranks report -------------------------------------------------------------------

    def heard(self, report: reports.Report, now: float) -> bool:
        """A message has come. Whether it counts: those of accused or earlier processes do not."""
        match self._epochs.state:
            case FailedState():
                return False
            case Starting() if isinstance(report, reports.Fatal):  # the exit may be known already
                return report.incarnation == self._fleet.incarnation(report.rank)
            case _:
                return self._fleet.heard(report, now)

    def committed(self, tokens: reports.Tokens, now: float) -> None:
        """A rank has committed a step."""
        self._epochs.stall.committed(tokens.epoch, now)
        if self._epochs.is_present(tokens.epoch) and not self._epochs.coordinator.active:
            self._epochs.attempts.forward()
        self.last_step = max(self.last_step, tokens.step)

    def on_report(self, report: reports.Report, now: float) -> None:
        """Take one message that counts (`heard`). `Tokens` are the host's."""
        view = self._fleet.views[report.rank]
        match report:
            case reports.Hello():
                self._fleet.lives.on_hello(view, report.pid, report.host, now)
            case reports.Ready():
                self._on_ready(report, now)
            case reports.Heartbeat():
                self._epochs.recompiled(self._fleet.on_heartbeat(report))
            case reports.FenceAck():
                self._epochs.on_ack(report, now)
            case reports.Resumed():
                self._on_resumed(report, now)
            case reports.StepAborted():
                self._on_symptom(report, now)
            case reports.NonFinite():
                self._on_non_finite(report, now)
            case reports.ExpertsLoaded():
                self._on_experts_loaded(report, now)
            case reports.Fatal():
                self._on_fatal(report)
            case reports.Tokens() | reports.Holdings():
                raise AssertionError("sequences belong to whoever owns the sequences")
            case _:
                assert_never(report)

    def on_exit(
        self, rank: RankId, incarnation: Incarnation, detail: str, now: float, by_itself: bool
    ) -> None:
        """A rank's process is gone: the one signal that accuses by itself.

        `by_itself`: it crashed, rather than that somebody killed it.
        """
        fault = self._fleet.detector.exited(rank, incarnation, detail, now)
        if fault is None:
            return
        view = self._fleet.views[rank]
        starting = isinstance(self._epochs.state, Starting)
        if view.dead or self._epochs.over or starting:
            self._fleet.lives.on_exit(view, now)
            if starting and not self._epochs.stopping:
                self._start_up.exit_of(view, fault, now)
                self._look_at_start(now)
        else:
            if by_itself or view.last_words:
                said = view.last_words or detail
                fault = replace(fault, detail=said, signature="process_exit")
            self._epochs.accuse([fault], now)  # first, for what it was when it went matters
            self._fleet.lives.on_exit(view, now)

    def on_forkserver_gone(self) -> None:
        """Its ranks live on. Only ranks that are still to start need it."""
        self._tell(events.ForkserverGone())
        if isinstance(self._epochs.state, Starting) and not self._start_up.loaded:
            self._epochs.fail("the fork server ended while ranks were starting")

    def _on_ready(self, ready: reports.Ready, now: float) -> None:
        log.info(
            "rank %d ready on %s: %d KV blocks, weights in %.2f s%s",
            ready.rank, ready.device, ready.kv_blocks_total, ready.load_s,
            "".join(
                f", {name}: {told}"
                for name, told in (("kernels", ready.kernels), ("graphs", ready.graphs))
                if told
            ),
        )  # fmt: skip
        view = self._fleet.views[ready.rank]
        self._fleet.lives.on_ready(view, now)
        view.maskable, view.graphs = ready.maskable, ready.graphs
        view.stats = reports.RankStats(kv_blocks_total=ready.kv_blocks_total)
        if ready.load_sources:
            loaded = (ready.load_s, ready.load_bytes, ready.load_sources)
            self._tell(events.ExpertsTaken(view.rank, *loaded))
        if not isinstance(self._epochs.state, Starting):
            self._tell(events.RankReady(view.rank, view.incarnation))
            self._epochs.proceed(now)
        elif self._start_up.loaded:
            self._epochs.meet()

    def _on_resumed(self, report: reports.Resumed, now: float) -> None:
        if isinstance(self._epochs.state, Starting):
            if self._start_up.met(report.rank):
                self._epochs.begin(self._start_up.exited, now)
            return
        if report.experts_loaded:
            loaded = (report.experts_s, report.experts_bytes, report.experts_sources)
            self._tell(events.ExpertsTaken(report.rank, *loaded))
        self._epochs.on_resumed(report, now)

    def _on_symptom(self, report: reports.StepAborted, now: float) -> None:
        self.symptoms += 1
        self._tell(events.SymptomSeen(report.rank, report.detail))
        if isinstance(self._epochs.state, Starting):
            self._epochs.fail(f"the ranks could not meet: {report.detail}")
        elif self._epochs.is_present(report.epoch):
            self._epochs.symptoms.reported(report.rank, now)

    def _on_non_finite(self, report: reports.NonFinite, now: float) -> None:
        """Redo the step. Whom to blame is clear when all have left it: no later claim comes."""
        where = f"{report.phase}, layer {report.layer}"
        self._tell(events.NumbersBroken(report.rank, where, report.produced_here))
        self._epochs.numbers.claim(report)
        if not isinstance(self._epochs.state, Starting) and self._epochs.is_present(report.epoch):
            self._epochs.redo("non_finite", now)

    def _on_fatal(self, report: reports.Fatal) -> None:
        view, lines = self._fleet.views[report.rank], report.detail.strip().splitlines()
        view.last_words = lines[-1] if lines else ""
        if report.user_error and isinstance(self._epochs.state, Starting):
            self._epochs.fail(view.last_words, user_error=True)

    def _on_experts_loaded(self, report: reports.ExpertsLoaded, now: float) -> None:
        if report.request or report.error is None:
            self._epochs.loads.on_loaded(report, now)
            return
        self._tell(events.LoadRefused(report.rank, report.error))
        log.warning("rank %d could not load experts: %s", report.rank, report.error)
        if isinstance(self._epochs.state, Starting):
            self._epochs.fail(f"rank {report.rank} could not load its experts: {report.error}")
            return
        self._epochs.attempts.load_failed(now)
        if report.rank in self._fleet.switched:
            self._fleet.forget_table(report.rank)
        if self._epochs.matters(report.rank):
            under_way = self._epochs.coordinator.active
            cause = self._epochs.coordinator.record.cause if under_way else "load"
            self._epochs.redo(cause, now)
