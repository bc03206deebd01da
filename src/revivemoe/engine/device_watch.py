"""What monitors say of the ranks' devices, and what the policy makes of it."""

from typing import TYPE_CHECKING

from revivemoe.epochs.state import (
    FailedState,
    Serving,
    Starting,
)
from revivemoe.recovery.faults import DeviceReport, Fault

if TYPE_CHECKING:
    from revivemoe.engine.engine import Engine


class DeviceWatch:
    """Turns levels into actions."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._due: list[tuple[int, DeviceReport]] = []
        """Injected: to come when the instance has reached a step."""

    def on_report(self, report: DeviceReport, now: float) -> None:
        """A monitor tells of a device."""
        engine = self._engine
        view = engine.ranks.get(report.rank)
        if view is None or isinstance(engine.state, FailedState | Starting):
            return
        level = report.level
        action = "clear" if level == 0 else engine.config.policy.action_of(level)
        said = {"id": report.rank, "level": level, "code": report.code, "action": action}
        engine.event("device", {**said, "detail": report.detail, "source": report.source})
        if view.dead:
            return
        detail = f"{report.code}: {report.detail}" if report.detail else report.code
        fault = Fault(report.rank, "device_fault", detail, level)
        match action:
            case "clear":
                view.fault = None
            case "watch":
                view.fault = fault
            case "retry" if isinstance(engine.state, Serving):
                engine.redo("device_fault", now)
            case "drain":
                engine.maintenance.drain(fault, now)
            case "isolate":
                engine.accuse([fault], now)
            case _:
                pass

    def report_at(self, report: DeviceReport, step: int | None, now: float) -> None:
        """A report that shall come at a step; now, without one. Raises ValueError if it is past."""
        engine = self._engine
        view = engine.ranks.get(report.rank)
        if view is None or view.dead:
            raise ValueError(f"id {report.rank} is not a living rank")
        if step is None:
            self.on_report(report, now)
        elif step <= engine.last_step:
            raise ValueError(f"step {step} is past: the instance is at {engine.last_step}")
        else:
            self._due.append((step, report))

    def reached(self, step: int, now: float) -> None:
        """The instance is at a step."""
        due = [report for at, report in self._due if at <= step]
        self._due = [pair for pair in self._due if pair[0] > step]
        for report in due:
            self.on_report(report, now)
