"""What monitors say of the ranks' devices, and what the policy makes of it."""

from dataclasses import replace

from revivemoe.engine.device_signals import DeviceSignals, Key, Signal, about_the_same
from revivemoe.engine.maintenance import Maintenance
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.state import FailedState, Starting
from revivemoe.ids import RankId
from revivemoe.messages.events import DeviceReported, Tell
from revivemoe.recovery.faults import DeviceReport

MOST_EARLY = 1024


class DeviceWatch:
    """Turns levels into actions."""

    def __init__(self, epochs: Epochs, maintenance: Maintenance, tell: Tell) -> None:
        self._epochs, self._tell = epochs, tell
        self._views = epochs.fleet.views
        self.signals = DeviceSignals(epochs, maintenance, tell)
        self._said: dict[Key, tuple[int, int]] = {}
        """Levels, and how often, of the signals about several ranks: each of these is told of it,
        and once will do."""
        self._early: dict[tuple[RankId, str], DeviceReport] = {}
        """The last of each (rank, code) from before the instance served: monitors tell of changes
        only, and will not say it again."""
        self._retries: dict[RankId, list[float]] = {}
        """When the device of each rank asked for a retry, within the window."""
        self._due: list[tuple[int, DeviceReport]] = []
        """Injected: to come when the instance has reached a step."""

    def on_report(self, report: DeviceReport, now: float) -> None:
        """A monitor tells of a device."""
        if report.rank not in self._views or isinstance(self._epochs.state, FailedState):
            return
        if isinstance(self._epochs.state, Starting):
            self._keep(report)
        else:
            self._take_early(now)
            self._take(report, now)

    def tick(self, now: float) -> None:
        """The instance is past its start: what was told before, and what was refused."""
        self._take_early(now)
        self.signals.tick(now)

    def _keep(self, report: DeviceReport) -> None:
        if report.level == 0 and not report.code:
            self._early = {k: r for k, r in self._early.items() if k[0] != report.rank}
            return
        key = (report.rank, report.code)
        self._early.pop(key, None)
        if len(self._early) < MOST_EARLY:
            self._early[key] = report

    def _take_early(self, now: float) -> None:
        early, self._early = self._early, {}
        for report in early.values():
            self._take(report, now)

    def _take(self, report: DeviceReport, now: float) -> None:
        """Tell of it; then see, once for all ranks that it speaks of, to what it means."""
        policy, known = self._epochs.policy, [r for r in report.shared if r in self._views]
        ranks = tuple(known) or (report.rank,)
        level = policy.level_of(report.code, report.level) if report.level else 0
        action = policy.action_of(level) if level else None
        doing = action or ("ignore" if report.level else "clear")
        told = (report.rank, report.level, report.code, doing, report.detail, report.source)
        self._tell(DeviceReported(*told))
        if action is not None:
            said = (report.source, report.code, ranks, level, action, report.detail)
            self._act(Signal(*said), report.times, now)
        elif not report.level:
            self._clear(report, ranks, now)

    def _act(self, signal: Signal, times: int, now: float) -> None:
        said = (signal.level, times)
        if self._said.get(signal.key) == said:
            return
        self._unsay(signal.key)
        if signal.shared:
            self._said[signal.key] = said
        living = [rank for rank in signal.ranks if not self._views[rank].dead]
        if signal.action == "retry" and self._retried_too_often(living, now):
            signal = replace(signal, action="drain")
        if signal.action in ("drain", "isolate"):
            self.signals.ask(signal, now)
            return
        self.signals.take_back(signal.key)
        for rank in signal.ranks:
            fault = signal.fault(rank) if signal.action == "watch" else None
            self._views[rank].device_says(signal.code, fault)
        if signal.action == "retry" and living and self._epochs.serving:
            self._epochs.redo("device_fault", now, asked=True)

    def _retried_too_often(self, ranks: list[RankId], now: float) -> bool:
        """The same ranks, a new domain: what repeats on one device is laid to it. The others do not
        pay for it for ever."""
        often = [self._retries_too_often(rank, now) for rank in ranks]  # each is counted
        return any(often)

    def _clear(self, report: DeviceReport, ranks: tuple[RankId, ...], now: float) -> None:
        """Taken back: what this code said of them; of one rank, without a code, all that was said
        of it alone. It may hold on for others."""
        key = (report.source, report.code, ranks)
        hold_on = self.signals.beyond(key)
        self._unsay(key)
        self.signals.take_back(key)
        for rank in ranks:
            for code in [report.code] if report.code else self._said_alone(rank):
                self._views[rank].device_says(code, None)
        if len(ranks) == 1:
            self.signals.take_back_of(report.rank, report.code)
        for signal in hold_on:
            self._act(signal, report.times, now)

    def _unsay(self, key: Key) -> None:
        """Something else is said of these ranks, or nothing any more."""
        self._said = {k: said for k, said in self._said.items() if not about_the_same(k, key)}

    def _said_alone(self, rank: RankId) -> list[str]:
        """Codes of this rank that no signal about several has said."""
        together = {code for _, code, ranks in self._said if rank in ranks}
        return [code for code in self._views[rank].device_codes if code not in together]

    def _retries_too_often(self, rank: RankId, now: float) -> bool:
        policy = self._epochs.policy
        recent = [t for t in self._retries.get(rank, ()) if t >= now - policy.window_s]
        self._retries[rank] = [*recent, now]
        return len(recent) >= policy.max_retries

    def report_at(self, report: DeviceReport, step: int | None, last_step: int, now: float) -> None:
        """A report that shall come at a step; now, without one. Raises ValueError if it is past."""
        view = self._views.get(report.rank)
        if view is None or view.dead:
            raise ValueError(f"id {report.rank} is not a living rank")
        if step is None:
            self.on_report(report, now)
        elif step <= last_step:
            raise ValueError(f"step {step} is past: the instance is at {last_step}")
        else:
            self._due.append((step, report))

    def reached(self, step: int, now: float) -> None:
        """The instance is at a step."""
        if not self._due:
            return
        due = [report for at, report in self._due if at <= step]
        self._due = [pair for pair in self._due if pair[0] > step]
        for report in due:
            self.on_report(report, now)
