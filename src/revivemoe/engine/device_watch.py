"""What monitors say of the ranks' devices, and what the policy makes of it."""

from revivemoe.engine.maintenance import Maintenance
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.rank_view import RankView
from revivemoe.epochs.state import FailedState, Starting
from revivemoe.ids import RankId
from revivemoe.messages.events import DeviceReported, Tell
from revivemoe.recovery.faults import DeviceReport, Fault


class DeviceWatch:
    """Turns levels into actions."""

    def __init__(self, epochs: Epochs, maintenance: Maintenance, tell: Tell) -> None:
        self._epochs, self._maintenance, self._tell = epochs, maintenance, tell
        self._retries: dict[RankId, list[float]] = {}
        """When the device of each rank asked for a retry, within the window."""
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
        if action == "clear":
            self._clear(view, report.code)
            return
        detail = f"{report.code}: {report.detail}" if report.detail else report.code
        fault = Fault(report.rank, "device_fault", detail, level)
        match action:
            case "watch" if not view.dead:
                view.fault = fault
            case "retry" if not view.dead and self._retries_too_often(report.rank, now):
                self._take_out(view, report.code, fault, now)
            case "retry" if epochs.serving and not view.dead:
                epochs.redo("device_fault", now, asked=True)
            case "drain":
                self._take_out(view, report.code, fault, now)
            case "isolate":
                view.device_faults[report.code] = fault
                self._isolate(view, fault, now)
            case _:
                pass

    def _clear(self, view: RankView, code: str) -> None:
        """Taken back: what this code said, or, of one that nobody knows, all."""
        if view.device_faults.pop(code, None) is None:
            view.device_faults.clear()
        if not view.dead or (view.fault is not None and view.fault.kind == "device_fault"):
            view.fault = next(iter(view.device_faults.values()), None)

    def _take_out(self, view: RankView, code: str, fault: Fault, now: float) -> None:
        """In good order, if it is a member: others hold nothing that would have to be moved."""
        view.device_faults[code] = fault
        if view.member:
            self._maintenance.drain(fault, now)
        else:
            self._isolate(view, fault, now)

    def _isolate(self, view: RankView, fault: Fault, now: float) -> None:
        if view.dead:
            self._epochs.fleet.lives.call_off(view, now)
            view.fault = fault
        else:
            self._epochs.accuse([fault], now)

    def _retries_too_often(self, rank: RankId, now: float) -> bool:
        """What repeats on one device is laid to it: the others do not pay for it for ever."""
        policy = self._epochs.policy
        recent = [t for t in self._retries.get(rank, ()) if t >= now - policy.window_s]
        self._retries[rank] = [*recent, now]
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
