"""A served checkpoint whose ranks can be killed and whose state can be awaited."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from support.warm import zygote

from revivemoe.bench import plain_http
from revivemoe.bench.server_process import ServerProcess

Status = dict[str, Any]


class Deployment(ServerProcess):
    """A `revivemoe serve` on CPU in fp32, forked from the zygote."""

    def _launch(self) -> Any:
        with open(os.devnull, "wb") as nowhere:
            return zygote().start(self._arguments, nowhere.fileno(), self._log.fileno())

    def pids(self) -> dict[int, int]:
        """Process of each rank that is not dead."""
        return {e["id"]: e["pid"] for e in self.status()["engines"] if e["status"] != "dead"}

    def fork_server(self) -> int:
        """Process of the only child."""
        (child,) = psutil.Process(self.pid).children()
        assert child.name() == "revive-fork"
        return int(child.pid)

    def num_dead(self) -> int:
        return len(with_status(self.status(), "dead"))

    def inject(
        self, rank: int, kind: str, at: dict[str, Any] | None = None, params: Any = None
    ) -> None:
        """Arm a fault at a point of a rank's step loop; now, without one."""
        body = {"id": rank, "kind": kind, "at": at or {}, "params": params or {}}
        response = plain_http.post(f"{self.url}/v1/fault_tolerance/inject", json=body, timeout=10)
        assert response.status_code == 202, response.text

    def apply(self, instruction: str, **params: Any) -> str:
        """Ask for something; returns the request id."""
        body = {"instruction": instruction, "params": params}
        response = plain_http.post(f"{self.url}/v1/fault_tolerance/apply", json=body, timeout=10)
        assert response.status_code == 202, response.text
        return str(response.json()["request_id"])

    def refused(self, instruction: str, **params: Any) -> str:
        """Ask for something that is refused with 400; returns why."""
        body = {"instruction": instruction, "params": params}
        response = plain_http.post(f"{self.url}/v1/fault_tolerance/apply", json=body, timeout=10)
        assert response.status_code == 400, response.text
        return str(response.json()["error"]["message"])

    def await_rejoin(self, rank: int, timeout_s: float = 30.0) -> Status:
        """Start a new process for a rank and wait until it is a member again."""
        request_id = self.apply("rejoin", id=rank)
        return self.await_status(
            lambda s: (
                any(r["request_id"] == request_id for r in s["recoveries"])
                and s["state"] == "serving"
            ),
            timeout_s,
        )

    def inject_kill(self, rank: int, **at: int | str) -> None:
        """Arm a SIGKILL of a rank by itself, at a point of its step loop."""
        body = {"id": rank, "kind": "kill", "at": at}
        response = plain_http.post(f"{self.url}/v1/fault_tolerance/inject", json=body, timeout=10)
        assert response.status_code == 202, response.text

    def get(self, path: str) -> httpx.Response:
        return plain_http.get(self.url + path, timeout=10)

    def await_status(self, holds: Callable[[Status], bool], timeout_s: float = 20.0) -> Status:
        """The first status document of which something holds. Asks ever less often: the answers
        cost the engine and the tests what the ranks could use.
        """
        deadline, pause_s = time.monotonic() + timeout_s, 0.01
        while not holds(status := self.status()):
            assert time.monotonic() < deadline, f"never came: {status}"
            time.sleep(pause_s)
            pause_s = min(1.2 * pause_s, 0.1)
        return status

    def await_recovery(self, num_dead: int = 1) -> Status:
        """Serving again without so many ranks."""
        return self.await_status(
            lambda s: s["state"] == "serving" and len(with_status(s, "dead")) == num_dead
        )

    def await_idle(self) -> Status:
        """No rank has a sequence or a block in use."""
        figures = ("running", "waiting", "kv_blocks_used")
        return self.await_status(lambda s: not any(e[f] for e in s["engines"] for f in figures))

    def per_rank(self, name: str) -> dict[int, float]:
        """A metric by rank."""
        return {
            int(sample.labels["rank"]): sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name
        }

    def await_per_rank(self, name: str, ranks: set[int], within_s: float = 5.0) -> dict[int, float]:
        """A metric by rank, once these ranks agree on it: heartbeats tell of it later."""
        deadline = time.monotonic() + within_s
        while True:
            values = self.per_rank(name)
            if len({values[rank] for rank in ranks}) == 1 or time.monotonic() > deadline:
                return values
            time.sleep(0.05)


def with_status(status: Status, name: str) -> list[Status]:
    """The ranks in one condition."""
    return [engine for engine in status["engines"] if engine["status"] == name]


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


BY_HAND = "[rejoin]\nauto = false\n"
BARE = "[experts]\nrestore_redundancy = false\n"


@contextmanager
def deployed(
    model_dir: Path, num_ranks: int, *flags: str, auto_rejoin: bool = False
) -> Iterator[Deployment]:
    """Serve a checkpoint; on an error the end of the server's log is printed.

    `auto_rejoin`: lost ranks come back by themselves. Most tests look at what is without them.
    """
    fixed = ["--data-parallel-size", str(num_ranks), "--device", "cpu", "--dtype", "float32"]
    given = list(flags)
    with tempfile.TemporaryDirectory(prefix="revivemoe-policy-") as folder:
        if not auto_rejoin:
            given = _by_hand(given, Path(folder) / "policy.toml")
        with Deployment(model_dir, [*fixed, *given]) as server:
            yield from _until_error(server)


def _by_hand(flags: list[str], path: Path) -> list[str]:
    """The same flags, with a policy under which nothing comes back by itself, if not asked for."""
    name, text = "--recovery-policy", ""
    if name in flags:
        at = flags.index(name)
        text = Path(flags[at + 1]).read_text()
        flags = [*flags[:at], *flags[at + 2 :]]
    if "restore_redundancy" not in text:
        text = text.replace("[experts]\n", BARE) if "[experts]\n" in text else text + BARE
    path.write_text(text + BY_HAND)
    return [*flags, name, str(path)]


def _until_error(server: Deployment) -> Iterator[Deployment]:
    try:
        yield server
    except BaseException:
        print(server.log_tail(40))
        raise
