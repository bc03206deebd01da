"""One deployment under load and faults for a while, with everything that was seen of it."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from revivemoe.bench import plain_http
from revivemoe.bench.server_process import ServerProcess
from revivemoe.bench.soak.episode import Episode, Episodes
from revivemoe.bench.soak.instance import Instance, rank_pids, shape
from revivemoe.bench.soak.layouts import Layout
from revivemoe.bench.soak.load import SILENT_FOR_S, Load, Request, Tally
from revivemoe.bench.soak.processes import Family
from revivemoe.bench.soak.resources import Sample, begin_and_end, growths
from revivemoe.bench.soak.schedule import schedule
from revivemoe.bench.soak.setup import Setup
from revivemoe.bench.soak.strikes import Striker
from revivemoe.bench.soak.violations import Violation, Violations

SAMPLES_EVERY_S = 1.0
TIDY_WITHIN_S = 10.0
"""For processes to be gone, and for blocks to be free once there is nothing to do."""
WARM_UP_ROUNDS = 2
"""Of all requests, before the first fault and the first sample."""


@dataclass
class Soaked:
    """What one deployment went through, so far."""

    layout: str
    violations: Violations = field(default_factory=Violations)
    tally: Tally = field(default_factory=Tally)
    episodes: list[Episode] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    """Pieces of shared memory, after each fault."""
    seconds: float = 0.0


class Soak:
    """Fills a `Soaked`, which may be read at any time."""

    def __init__(
        self,
        server: ServerProcess,
        requests: Sequence[Request],
        setup: Setup,
        into: Soaked,
        say: Callable[[str], None],
    ) -> None:
        self.family = Family(server.pid)
        self._server, self._requests = server, requests
        self._setup, self._say = setup, say
        self._into, self._violations = into, into.violations

    async def run(self, layout: Layout) -> None:
        began = time.monotonic()
        async with _client(self._server.url) as client:
            instance = Instance(client, self._server.pid)
            load = Load(client, self._requests, self._setup.streams, self._violations)
            self._into.tally = load.tally
            try:
                await self._warm_up(load)
                await self._faults(layout, instance)
                await load.end()
                await self._idle(instance)
            except Violation as violation:
                self._violations.add(str(violation))
            except httpx.HTTPError as error:
                self._violations.add(f"the server does not answer: {error!r}")
            finally:
                await load.cancel()
                self._into.seconds = time.monotonic() - began
        self._judge_resources()

    async def _faults(self, layout: Layout, instance: Instance) -> None:
        """One after the other, for so long. Raises Violation when it cannot go on."""
        until = time.monotonic() + 60 * self._setup.minutes
        draw = random.Random(f"{self._setup.seed} {layout.name}")
        well = shape(await instance.status())
        with Striker(instance) as striker:
            episodes = Episodes(instance, striker, well)
            for fault in schedule(draw, layout, self._setup.every_s):
                await self._quiet(instance, fault.wait_s)
                if time.monotonic() > until:
                    return
                self._violations.during = fault.name
                try:
                    self._told(await episodes.run(fault))
                except Violation as violation:
                    self._violations.add(str(violation))
                    self._say(f"      violated: {violation}")
                    await episodes.repair(fault)
                await self._tidy(instance)

    async def _warm_up(self, load: Load) -> None:
        deadline = time.monotonic() + 2 * SILENT_FOR_S
        while load.tally.done < WARM_UP_ROUNDS * len(self._requests):
            if time.monotonic() > deadline:
                raise Violation(f"too slow: {load.tally.done} requests in {2 * SILENT_FOR_S:.0f} s")
            await asyncio.sleep(SAMPLES_EVERY_S)

    async def _quiet(self, instance: Instance, seconds: float) -> None:
        """Nothing is struck for so long: the time for samples."""
        until = time.monotonic() + seconds
        pids = list((await instance.pids()).values())
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(OSError):  # whoever is gone is missed elsewhere
                self._into.samples.append(self.family.sample(pids))
            await asyncio.sleep(min(SAMPLES_EVERY_S, left))

    async def _tidy(self, instance: Instance) -> None:
        """Whoever was lost is gone as a process, too."""
        deadline = time.monotonic() + TIDY_WITHIN_S
        while strangers := self.family.strangers((await instance.pids()).values()):
            if time.monotonic() > deadline:
                raise Violation(f"left behind: {', '.join(strangers)}")
            await asyncio.sleep(SAMPLES_EVERY_S / 2)
        self._into.segments.append(len(self.family.segments()))

    async def _idle(self, instance: Instance) -> None:
        """With the last stream, everything it held is given back."""
        deadline = time.monotonic() + TIDY_WITHIN_S
        while busy := [
            f"rank {e['id']}: {e['running']} running, {e['kv_blocks_used']} blocks"
            for e in (await instance.status())["engines"]
            if e["running"] or e["waiting"] or e["kv_blocks_used"]
        ]:
            if time.monotonic() > deadline:
                raise Violation(f"in use although no stream is: {', '.join(busy)}")
            await asyncio.sleep(SAMPLES_EVERY_S / 2)
        self.family.look(rank_pids(await instance.status()).values())

    def _told(self, episode: Episode) -> None:
        self._into.episodes.append(episode)
        asked = f", {episode.asked_back} asked back" if episode.asked_back else ""
        self._say(
            f"{len(self._into.episodes):4d}  {episode.name}: recovered in "
            f"{episode.recovered_s:.2f} s, all back in {episode.well_s:.2f} s{asked}"
        )
        for accused in episode.unprovoked:
            self._say(f"      unprovoked: {accused}")

    def _judge_resources(self) -> None:
        for growth in growths(*begin_and_end(self._into.samples)):
            self._violations.add(growth)
        segments = self._into.segments
        if segments and segments[-1] > segments[0]:
            self._violations.add(f"shared memory: {segments[0]} pieces became {segments[-1]}")


def _client(url: str) -> httpx.AsyncClient:
    """Streams are watched, not timed out; of the rest, each question says how long it waits."""
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(30.0, read=2 * SILENT_FOR_S)
    return plain_http.async_client(base_url=url, timeout=timeout, limits=limits)
