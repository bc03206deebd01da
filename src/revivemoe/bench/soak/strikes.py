"""Brings a fault about: real signals to real processes, or by the API."""

import asyncio
import contextlib
import os
import signal

import psutil

from revivemoe.bench.soak.consequences import out
from revivemoe.bench.soak.instance import Instance, Refused
from revivemoe.bench.soak.schedule import Fault
from revivemoe.bench.soak.violations import Violation

BLINK_S = 0.4
"""Shorter than any silence that is accused."""
ENGINE_STANDS_S = 2.0
CONTINUED_AFTER_S = 30.0
SWITCHES_WITHIN_S = 10.0
POLL_S = 0.05


class Striker:
    """Strikes one instance. Whoever was stopped is continued much later, if it is still there."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._stopped: list[int] = []
        """Descriptors of stopped processes: their numbers may be another's by then."""

    async def strike(self, fault: Fault) -> None:
        """Raises Refused if the server does not take part in it. May wait for it without end."""
        kind = fault.kind
        match kind.how:
            case "kill":
                await self._kill(fault.ranks, fault.delay_s)
            case "all":
                await self._kill(fault.ranks)
            case "stop":
                pids = await self._instance.pids()
                self._stop(pids[fault.ranks[0]])
            case "blink":
                await _stand(await self._pid(fault), BLINK_S)
            case "engine":
                await _stand(self._instance.engine_pid, ENGINE_STANDS_S)
            case "relapse":
                await self._kill_twice(fault.ranks[0])
            case "fork_server":
                os.kill(fork_server(self._instance.engine_pid).pid, signal.SIGKILL)
                await self._kill(fault.ranks)
            case "pause":
                await self._pause(fault.delay_s)
            case "switch":
                await self._switch(*fault.ranks)
            case "inject":
                await self._inject(fault)
            case "apply":
                await self._apply(fault)

    async def _pid(self, fault: Fault) -> int:
        return (await self._instance.pids())[fault.ranks[0]]

    async def _kill(self, ranks: tuple[int, ...], apart_s: float = 0.0) -> None:
        pids = await self._instance.pids()
        for number, rank in enumerate(ranks):
            if number and apart_s:
                await asyncio.sleep(apart_s)
            _signal(pids[rank], signal.SIGKILL)

    def _stop(self, pid: int) -> None:
        """As `kill -STOP`; SIGCONT follows when everybody has long gone on without it."""
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        self._stopped.append(pidfd)
        asyncio.get_running_loop().call_later(CONTINUED_AFTER_S, self._continue, pidfd)

    def _continue(self, pidfd: int) -> None:
        if pidfd in self._stopped:
            self._stopped.remove(pidfd)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)

    def __enter__(self) -> "Striker":
        return self

    def __exit__(self, *raised: object) -> None:
        for pidfd in list(self._stopped):
            self._continue(pidfd)

    async def _kill_twice(self, rank: int) -> None:
        """The second time as soon as its new process is there."""
        first = (await self._instance.pids())[rank]
        _signal(first, signal.SIGKILL)
        while (second := (await self._instance.pids()).get(rank)) in (None, first):
            await asyncio.sleep(POLL_S)
        assert second is not None
        _signal(second, signal.SIGKILL)

    async def _pause(self, seconds: float) -> None:
        await self._instance.apply("pause")
        while (await self._instance.status())["state"] != "paused":
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(seconds)
        await self._instance.apply("resume")

    async def _switch(self, donor: int, lost: int) -> None:
        """An expert rank is lost, and an attention rank takes its role, beside the steps."""
        before = await self._instance.status()
        await self._kill((lost,))
        while not out(lost, before, await self._instance.status()):
            await asyncio.sleep(POLL_S)
        with contextlib.suppress(Refused, TimeoutError):  # the lost one may be back already
            await self._instance.apply("role_switch", id=donor)
            async with asyncio.timeout(SWITCHES_WITHIN_S):
                while (await self._instance.status())["engines"][donor]["roles"] != ["expert"]:
                    await asyncio.sleep(POLL_S)

    async def _inject(self, fault: Fault) -> None:
        (rank,), params = fault.ranks, dict(fault.kind.params)
        if fault.kind.what == "comm":
            params["peer"] = next(r for r in await self._instance.pids() if r != rank)
        await self._instance.inject(rank, fault.kind.what, fault.phase, params)

    async def _apply(self, fault: Fault) -> None:
        match fault.kind.what:
            case "retry":
                await self._instance.apply("retry")
            case "scale_down":
                await self._instance.apply("scale_down", ids=list(fault.ranks))
            case instruction:
                await self._instance.apply(instruction, id=fault.ranks[0])


async def _stand(pid: int, seconds: float) -> None:
    """A process stands still for so long."""
    _signal(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def fork_server(engine_pid: int) -> psutil.Process:
    """The engine's. Raises Violation if there is none, or more than one."""
    children = psutil.Process(engine_pid).children()
    found = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    if len(found) != 1:
        raise Violation(f"the engine should have one child, the fork server: {found}")
    return found[0]
