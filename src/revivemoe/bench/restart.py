"""A full stop and start, as the paper splits it up."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from revivemoe.bench import plain_http
from revivemoe.bench.server_process import ServerProcess

CATEGORIES = (
    "engine", "executor processes", "distributed groups", "XCCL", "role switch",
    "generator", "read cache", "compile", "other",
)  # fmt: skip
"""The paper's. Here: "distributed groups" and "XCCL" are one, the domain, and "read cache" and
"compile" are nothing: there are no compiled graphs."""


def restart(model_dir: Path, flags: Sequence[str]) -> dict[str, float]:
    """Seconds until the same deployment answers again: by category, and in "total"."""
    body = {"model": model_dir.name, "prompt": [20, 21], "max_tokens": 1}
    with ServerProcess(model_dir, flags) as server:
        began, wall = time.monotonic(), time.time()
        server.stop()
        server.restart()
        plain_http.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        total_s = time.monotonic() - began
        return {"total": total_s, **_categories(server.log_tail(200), wall, total_s)}


def _categories(log: str, wall: float, total_s: float) -> dict[str, float]:
    """What the log tells of a start."""
    listening = _at(log, "listening on") - wall
    warm = float(_found(r"fork server warm after ([\d.]+) s", log))
    weights = max(float(s) for s in re.findall(r"weights in ([\d.]+) s", log))
    spent = {"engine": listening, "executor processes": warm, "generator": weights}
    found = dict.fromkeys(CATEGORIES, 0.0) | spent
    found["other"] = max(0.0, total_s - sum(spent.values()))
    return found


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    if match is None:
        raise RuntimeError(f"the server's log lacks {pattern!r}")
    return match.group(1)


def _at(log: str, what: str) -> float:
    """When a line was logged, seconds since 1970."""
    stamp = _found(rf"(\S+ [\d:]+,\d+) .*{what}", log)
    whole, _, millis = stamp.partition(",")
    return time.mktime(time.strptime(whole, "%Y-%m-%d %H:%M:%S")) + int(millis) / 1e3
