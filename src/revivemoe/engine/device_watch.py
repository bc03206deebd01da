"""What monitors say of the ranks' devices, and what the policy makes of it."""

from revivemoe.engine.maintenance import Maintenance
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.state import FailedState, Starting
from revivemoe.ids import RankId
from revivemoe.messages.events import DeviceReported, Tell
from revivemoe.recovery.faults import DeviceReport, Fault


class DeviceWatch:
    """Turns levels into actions."""

    def __init__(self, epochs: Epochs, maintenance: Maintenance, tell: Tell) -> None:
        self._epochs, self._maintenance, self._tell = epochs, maintenance, tell
        self._retries: dict[str, list[float]] = {}
        """When each device asked for a retry, within the window."""
        self._due: list[tuple[int, DeviceReport]] = []
        """Injected: to come when the instance has reached a step."""

    def on_report(self, report: DeviceReport, now: float) -> None:
        """A monitor tells of a device."""
        epochs = self._epochs
        view = epochs.fleet.views.get(report.rank)
        if view is None or isinstance(epochs.state, FailedState | Starting):
            return
        level = report.level
        action = "clear" if level == 0 else epochs.policy.action_of(level)
        told = (report.rank, level, report.code, action, report.detail, report.source)
        self._tell(DeviceReported(*told))
        if view.dead:
            return
        if action == "clear":
            view.fault = None
            return
        detail = f"{report.code}: {report.detail}" if report.detail else report.code
        fault = Fault(report.rank, "device_fault", detail, level)
        match action:
            case "watch":
                view.fault = fault
            case "retry" if self._retries_too_often(report.rank, now):
                self._maintenance.drain(fault, now)
            case "retry" if epochs.serving:
                epochs.redo("device_fault", now, asked=True)
            case "drain":
                self._maintenance.drain(fault, now)
            case "isolate":
                epochs.accuse([fault], now)
            case _:
                pass

    def _retries_too_often(self, rank: RankId, now: float) -> bool:
        """What repeats on one device is laid to it: the others do not pay for it for ever."""
        policy, view = self._epochs.policy, self._epochs.fleet.views[rank]
        recent = [t for t in self._retries.get(view.device, ()) if t >= now - policy.window_s]
        self._retries[view.device] = [*recent, now]
        return len(recent) >= policy.max_retries

    def report_at(self, report: DeviceReport, step: int | None, last_step: int, now: float) -> None:
        """A report that shall come at a step; now, without one. Raises ValueError if it is past."""
        view = self._epochs.fleet.views.get(report.rank)
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
