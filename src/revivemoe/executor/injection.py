"""One-shot faults at an exact (step, layer, phase). Real ones: `kill` is SIGKILL to ourselves."""

import signal
import threading
import time
from collections.abc import Callable, Collection

import torch

from revivemoe.comm.sever import sever
from revivemoe.messages.commands import Inject

HOARD_MIB = 1024
"""What a `memory` fault takes at most if not told: a host without limits shall survive it."""
CHUNK_MIB = 16


class InjectedError(RuntimeError):
    """What an injected `error` raises: the rank's own code has failed."""


class Injections:
    """Faults waiting for their moment in this process."""

    def __init__(self) -> None:
        self._waiting: list[Inject] = []
        self._slow: list[Inject] = []
        self._spoil: tuple[str, int] | None = None
        """Phase and layer (-1: any) whose output shall be turned into NaN, once."""

    def add(self, fault: Inject) -> None:
        """Keep a fault for its moment; one without a moment strikes now."""
        at_once = fault.step is None and fault.layer is None and fault.phase is None
        if at_once and "prompt_token" not in fault.params and fault.kind != "nan":
            self._strike(fault, -1)
        else:
            self._waiting.append(fault)

    def reached(
        self, step: int, phase: str, layer: int, tokens: Callable[[], Collection[int]]
    ) -> None:
        """The step loop is here: strike if a fault waits for this point.

        `tokens`: those in the prompts that run in this step, asked for only if it matters.
        """
        for fault in self._waiting:
            if _matches(fault, step, phase, layer) and _concerns(fault, tokens):
                if "prompt_token" not in fault.params:
                    self._waiting.remove(fault)
                self._strike(fault, layer)
                return

    def spoilt(self, phase: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        """What a stage has produced; with NaN in it if that was asked for."""
        if self._spoil is None or phase != self._spoil[0] or self._spoil[1] not in (layer, -1):
            return values
        if not values.numel():
            return values  # nothing to spoil: at the next chance
        self._spoil = None
        values = values.clone()
        values[-1] = float("nan")
        return values

    def delay_s(self, phase: str, own_s: float) -> float:
        """How much longer a slow rank takes for a phase that took it `own_s` seconds."""
        factors = [_factor(f) for f in self._slow if f.phase in (None, phase)]
        return max(0.0, (max(factors, default=1.0) - 1.0) * own_s)

    def _strike(self, fault: Inject, layer: int) -> None:
        match fault.kind:
            case "kill":
                signal.raise_signal(signal.SIGKILL)
            case "hang":
                _hang(str(fault.params.get("how", "loop")))
            case "error":
                raise InjectedError("injected error")
            case "memory":
                _hoard(_mebibytes(fault))
            case "slow":
                self._slow.append(fault)
            case "nan":
                self._spoil = ("experts", -1) if fault.phase is None else (fault.phase, layer)
            case "comm":
                peer_pid = fault.params["peer_pid"]
                assert isinstance(peer_pid, int)
                sever(peer_pid)
            case unknown:
                raise AssertionError(f"unknown kind of fault {unknown!r}")


def _factor(fault: Inject) -> float:
    factor = fault.params.get("factor", 5)
    assert isinstance(factor, int | float), "checked where it was asked for"
    return factor


def _mebibytes(fault: Inject) -> int:
    mebibytes = fault.params.get("mebibytes", HOARD_MIB)
    assert isinstance(mebibytes, int), "checked where it was asked for"
    return mebibytes


def _hoard(mebibytes: int) -> None:
    """Take memory, and write to it, until the kernel's killer strikes or so much is held."""
    held = [b"x" * (CHUNK_MIB << 20) for _ in range(max(1, mebibytes // CHUNK_MIB))]
    raise InjectedError(f"holds {len(held) * CHUNK_MIB} MiB, and nothing has stopped it")


def _matches(fault: Inject, step: int, phase: str, layer: int) -> bool:
    """Later steps match too, so that a step just missed does not disarm the fault."""
    return (
        (fault.step is None or step >= fault.step)
        and (fault.phase is None or phase == fault.phase)
        and (fault.layer is None or layer in (fault.layer, -1))
    )


def _concerns(fault: Inject, tokens: Callable[[], Collection[int]]) -> bool:
    wanted = fault.params.get("prompt_token")
    return wanted is None or wanted in tokens()


def _hang(how: str) -> None:
    """Never comes back: an endless loop, a stopped process, or a deadlock."""
    match how:
        case "stop":
            signal.raise_signal(signal.SIGSTOP)
        case "deadlock":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        case _:
            while True:
                time.sleep(0.01)
