"""One-shot faults at an exact (step, layer, phase). Real ones: `kill` is SIGKILL to ourselves."""

import signal

from revivemoe.messages import Inject

SUPPORTED = ("kill",)
"""Kinds this executor can produce so far."""


class Injections:
    """Faults waiting for their moment in this process."""

    def __init__(self) -> None:
        self._waiting: list[Inject] = []

    def add(self, fault: Inject) -> None:
        """Keep a fault for its moment; one without a moment strikes now."""
        if fault.step is None and fault.layer is None and fault.phase is None:
            _strike(fault)
        self._waiting.append(fault)

    def reached(self, step: int, phase: str, layer: int) -> None:
        """The step loop is here: strike if a fault waits for this point."""
        for fault in self._waiting:
            if _matches(fault, step, phase, layer):
                self._waiting.remove(fault)
                _strike(fault)
                return


def _matches(fault: Inject, step: int, phase: str, layer: int) -> bool:
    """Later steps match too, so that a step just missed does not disarm the fault."""
    return (
        (fault.step is None or step >= fault.step)
        and (fault.phase is None or phase == fault.phase)
        and (fault.layer is None or layer in (fault.layer, -1))
    )


def _strike(fault: Inject) -> None:
    assert fault.kind in SUPPORTED, f"unknown kind of fault {fault.kind!r}"
    signal.raise_signal(signal.SIGKILL)
