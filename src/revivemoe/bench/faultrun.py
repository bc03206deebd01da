"""Streams under way, a real fault, and what everybody saw. For demo and benches."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import httpx

from revivemoe.bench import plain_http
from revivemoe.bench.documents import Event, Status
from revivemoe.bench.loadgen import Body, StreamResult, stream_all
from revivemoe.bench.server_process import ServerProcess

JUST_AFTER_S = 0.1
"""For events that follow the one that is waited for."""


@dataclass(frozen=True)
class FaultRun:
    """What a run with a kill showed. Times are monotonic seconds."""

    results: list[StreamResult]
    killed_at: float
    killed_wall: float
    migrated: frozenset[str]
    """Ids of the requests that were moved."""
    status: Status
    events: list[Event]

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
        """From just before the fault to the first sign of it in the engine."""
        signs = ("fault", "non_finite", "drain", "symptom", "device")
        at = min((e["time"] for e in self.events if e["event"] in signs), default=self.killed_wall)
        return at - self.killed_wall


async def run_with_kill(
    server: ServerProcess, bodies: Sequence[Body], victim: int, after_tokens: int
) -> FaultRun:
    """Stream `bodies`; SIGKILL rank `victim` once `after_tokens` tokens have come back in all."""
    pid = await asyncio.to_thread(server.rank_pid, victim)
    return await run_with_fault(server, bodies, partial(server.kill_pid, pid), after_tokens)


async def run_with_fault(
    server: ServerProcess, bodies: Sequence[Body], strike: Callable[[], object], after_tokens: int
) -> FaultRun:
    """Stream `bodies`; call `strike` once `after_tokens` tokens have come back in all."""
    seen = await asyncio.to_thread(lambda: len(server.status()["recoveries"]))
    results = [StreamResult() for _ in bodies]
    streaming = asyncio.create_task(stream_all(server.url, bodies, results))
    while sum(len(r.token_ids) for r in results) < after_tokens and not streaming.done():
        await asyncio.sleep(0.001)
    struck_wall, struck_at = time.time(), time.monotonic()
    await asyncio.to_thread(strike)
    await streaming
    status = await asyncio.to_thread(_settled, server, seen)
    events = await asyncio.to_thread(past_events, server.url, status["epoch"])
    events = [e for e in events if e["time"] >= struck_wall]
    migrated = {r for e in events if e["event"] == "migrated" for r in e["requests"]}
    return FaultRun(results, struck_at, struck_wall, frozenset(migrated), status, events)


def _settled(server: ServerProcess, seen: int, timeout_s: float = 10.0) -> Status:
    """The status once a recovery has been added to those seen, or as it is after the time-out."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = server.status()
        done = status["state"] == "serving" and len(status["recoveries"]) > seen
        if done or time.monotonic() > deadline:
            return status
        time.sleep(0.02)


def mend(server: ServerProcess) -> None:
    """Let whoever was lost rejoin."""
    for rank in [e["id"] for e in server.status()["engines"] if e["status"] == "dead"]:
        server.post("apply", {"instruction": "rejoin", "params": {"id": rank}})
    await_status(
        server,
        lambda status: all(e["logical_rank"] is not None for e in status["engines"]),
        "the rejoin",
    )


def await_status(
    server: ServerProcess, holds: Callable[[Status], bool], what: str, timeout_s: float = 120.0
) -> None:
    """Wait until it serves, and `holds`. Raises RuntimeError that names `what`."""
    deadline = time.monotonic() + timeout_s
    while not holds(status := server.status()) or status["state"] != "serving":
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come within {timeout_s:.0f} s")
        time.sleep(0.05)


def past_events(url: str, epoch: int, timeout_s: float = 5.0) -> list[Event]:
    """The instance's events up to its return to serving in `epoch`, and just after."""
    found: list[Event] = []
    serving = threading.Event()

    def read() -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            plain_http.stream(
                "GET", f"{url}/v1/fault_tolerance/events", timeout=timeout_s
            ) as stream,
        ):
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    found.append(json.loads(line[6:]))
                    if (found[-1].get("state"), found[-1].get("epoch")) == ("serving", epoch):
                        serving.set()

    threading.Thread(target=read, daemon=True).start()
    serving.wait(timeout_s)
    time.sleep(JUST_AFTER_S)
    return list(found)
