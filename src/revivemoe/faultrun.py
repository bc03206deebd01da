"""Streams under way, one rank killed for real, and what everybody saw. For demo and benches."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from revivemoe.cluster.server_process import ServerProcess
from revivemoe.loadgen import StreamResult, stream_all


@dataclass(frozen=True)
class FaultRun:
    """What a run with a kill showed. Times are monotonic seconds."""

    results: list[StreamResult]
    killed_at: float
    killed_wall: float
    migrated: frozenset[str]
    """Ids of the requests that were moved."""
    status: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def survivors(self) -> list[StreamResult]:
        """Streams whose rank lived on."""
        return [r for r in self.results if r.request_id not in self.migrated]

    @property
    def moved(self) -> list[StreamResult]:
        """Streams that went on elsewhere."""
        return [r for r in self.results if r.request_id in self.migrated]

    @property
    def true_detect_s(self) -> float:
        """From just before the kill to the detector's accusation."""
        at = min(e["time"] for e in self.events if e["event"] == "fault")
        return float(at - self.killed_wall)


async def run_with_kill(
    server: ServerProcess, bodies: Sequence[dict[str, Any]], victim: int, after_tokens: int
) -> FaultRun:
    """Stream `bodies`; SIGKILL rank `victim` once `after_tokens` tokens have come back in all."""
    import time

    pid = await asyncio.to_thread(server.rank_pid, victim)
    results = [StreamResult() for _ in bodies]
    streaming = asyncio.create_task(stream_all(server.url, bodies, results))
    while sum(len(r.token_ids) for r in results) < after_tokens and not streaming.done():
        await asyncio.sleep(0.001)
    killed_wall = time.time()
    killed_at = server.kill_pid(pid)
    await streaming
    status = await asyncio.to_thread(server.status)
    events = await asyncio.to_thread(past_events, server.url, status["epoch"])
    migrated = {r for e in events if e["event"] == "migrated" for r in e["requests"]}
    return FaultRun(results, killed_at, killed_wall, frozenset(migrated), status, events)


def past_events(url: str, epoch: int, timeout_s: float = 5.0) -> list[dict[str, Any]]:
    """The instance's events up to its return to serving in `epoch`."""
    found: list[dict[str, Any]] = []

    def read() -> None:
        with httpx.stream("GET", f"{url}/v1/fault_tolerance/events", timeout=timeout_s) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    found.append(json.loads(line[6:]))
                    if (found[-1].get("state"), found[-1].get("epoch")) == ("serving", epoch):
                        return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout_s)
    return found
