"""One fault from the strike until all is well again."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from revivemoe.bench.documents import Status
from revivemoe.bench.soak.consequences import came, member, out, unprovoked
from revivemoe.bench.soak.instance import Instance, Refused, Shape, lacks, misplaced
from revivemoe.bench.soak.schedule import Fault
from revivemoe.bench.soak.strikes import Striker
from revivemoe.bench.soak.violations import Violation

POLL_S = 0.05
WELL_WITHIN_S = 60.0
NOTICED_WITHIN_S = 15.0
"""A slow rank need not be: it is so by comparison."""
OUT_FOR_S = 1.0
"""How long an operator lets a rank be out that does not return by itself."""
SETTLES_S = 0.5
"""What has no consequence may still have one in this time."""


@dataclass(frozen=True)
class Episode:
    """Times in seconds from the strike."""

    kind: str
    name: str
    recovered_s: float
    """Until it served again, without what was lost."""
    well_s: float
    """Until every rank and every replica was back."""
    asked_back: int
    """Ranks that an operator had to ask back."""
    unprovoked: tuple[str, ...]
    """Ranks accused that nobody had touched, and of what."""


class Episodes:
    """Strikes, mends, and waits. `well`: the shape of an instance of which nothing is missing."""

    def __init__(self, instance: Instance, striker: Striker, well: Shape) -> None:
        self._instance, self._striker, self._well = instance, striker, well
        self._asked: set[int] = set()
        self._out_since: dict[int, float] = {}

    async def run(self, fault: Fault) -> Episode:
        """Raises Violation if all is not well again within the bound."""
        try:
            return await self._run(fault)
        except Refused as refused:
            raise Violation(f"{fault.name}: {refused}") from None

    async def _run(self, fault: Fault) -> Episode:
        before, struck = await self._instance.status(), time.monotonic()
        self._asked, self._out_since = set(), {}
        await self._strike(fault)
        if fault.kind.consequence == "noticed":
            await self._notice(fault.ranks[0])
        else:
            nothing = f"{fault.name} came to nothing"
            await self._until(partial(came, fault, before), nothing, fault)
        recovered = time.monotonic()
        await self._mend(fault)
        status = await self._all_well(fault)
        return Episode(
            fault.kind.name,
            fault.name,
            recovered - struck,
            time.monotonic() - struck,
            len(self._asked),
            tuple(unprovoked(status, before["epoch"], fault.ranks)),
        )

    async def repair(self, fault: Fault) -> None:
        """As an operator after what a fault left undone. Raises Violation if that does not help."""
        status = await self._instance.status()
        with contextlib.suppress(Refused):
            for rank in misplaced(status, self._well):
                await self._instance.apply("isolate", id=rank)
        await self._all_well(replace(fault, kind=replace(fault.kind, asked_back=True)))

    async def _all_well(self, fault: Fault) -> Status:
        """Nothing is missing. Raises Violation with what is."""
        return await self._until(lambda s: not lacks(s, self._well), "", fault)

    async def _strike(self, fault: Fault) -> None:
        try:
            async with asyncio.timeout(WELL_WITHIN_S):
                await self._striker.strike(fault)
        except TimeoutError:
            raise Violation(f"{fault.name} could not be done in {WELL_WITHIN_S:.0f} s") from None
        if fault.kind.consequence == "nothing":
            await asyncio.sleep(SETTLES_S)

    async def _notice(self, rank: int) -> None:
        """Wait until the status tells of a rank; not for long, since it need not."""
        deadline = time.monotonic() + NOTICED_WITHIN_S
        while (await self._instance.status())["engines"][rank]["status"] == "healthy":
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(POLL_S)

    async def _mend(self, fault: Fault) -> None:
        """What an operator does about a rank that is not lost."""
        (rank, *_) = fault.ranks
        if fault.kind.mend == "clear":
            code = fault.kind.params["code"]  # a level of 0 takes back that code alone
            await self._instance.apply("report", id=rank, level=0, code=code)
        elif fault.kind.mend == "isolate":
            before = await self._until(partial(member, rank), f"rank {rank} is out", fault)
            await self._instance.apply("isolate", id=rank)
            await self._until(partial(out, rank, before), f"rank {rank} did not leave", fault)

    async def _until(self, holds: Callable[[Status], bool], otherwise: str, of: Fault) -> Status:
        """The first status of which it holds. Raises Violation (`otherwise`, or what lacks)."""
        began = time.monotonic()
        while not holds(status := await self._instance.status()):
            waited = time.monotonic() - began
            if waited > WELL_WITHIN_S or status["state"] == "failed":
                told = f"{otherwise}, " if otherwise else ""
                raise Violation(f"{told}{waited:.0f} s on: {lacks(status, self._well)}")
            await self._ask_back(status, of)
            await asyncio.sleep(POLL_S)
        return status

    async def _ask_back(self, status: Status, fault: Fault) -> None:
        """Ask for ranks that nobody starts again by himself: an operator or a device took them."""
        now, dead = time.monotonic(), {e["id"] for e in status["engines"] if e["status"] == "dead"}
        self._out_since = {rank: self._out_since.get(rank, now) for rank in dead}
        for rank, since in self._out_since.items():
            if fault.kind.asked_back and now - since > OUT_FOR_S:
                self._asked.add(rank)
                await self._instance.ask_back(rank)
