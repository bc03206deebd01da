"""A `revivemoe serve` as a child process: started, awaited, asked, and surely ended."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from revivemoe.bench import plain_http
from revivemoe.bench.documents import Status

BRIEF = ("--shutdown-timeout", "2")
"""Nobody waits for the streams of a measurement that is over."""


class ServerProcess:
    """Owns one server and, through it, its ranks. A context manager."""

    ready_path = "/ready"
    """Answers with 200 when it serves."""

    def __init__(self, model_dir: Path, flags: Sequence[str], start_timeout_s: float = 120.0):
        self._arguments = ["serve", str(model_dir), "--port", "0", *BRIEF, *flags]
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="revivemoe-serve-", suffix=".log")  # noqa: SIM115
        self.url = ""
        self.start_s = 0.0
        """From the launch until the instance served, seconds."""

    def __enter__(self) -> "ServerProcess":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def start(self) -> None:
        """Launch and wait until it is ready. Raises RuntimeError with the end of its log."""
        began = time.monotonic()
        self._process = self._launch()
        deadline = began + self._start_timeout_s
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log_tail()}")
            time.sleep(0.02)
        self.start_s = time.monotonic() - began

    def _launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "revivemoe.cli.main", *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log.file,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def restart(self) -> None:
        """Start again after `stop`, with the same flags."""
        self._log.file.truncate(0)
        self._log.file.seek(0)
        self.url = ""
        self.start()

    def stop(self, timeout_s: float = 15.0) -> int | None:
        """SIGTERM, then SIGKILL; returns the exit status."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._process = None
        return process.returncode

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def status(self) -> Status:
        """The status document."""
        response = plain_http.get(f"{self.url}/v1/fault_tolerance/status", timeout=10)
        document: Status = response.json()
        return document

    def post(self, what: str, body: dict[str, object]) -> None:
        """Ask something of the fault-tolerance API: `apply` or `inject`."""
        url = f"{self.url}/v1/fault_tolerance/{what}"
        plain_http.post(url, json=body, timeout=10).raise_for_status()

    def rank_pid(self, rank: int) -> int:
        """Process id of one rank."""
        pid = self.status()["engines"][rank]["pid"]
        assert pid is not None, f"rank {rank} has no process yet"
        return pid

    def kill_pid(self, pid: int, number: signal.Signals = signal.SIGKILL) -> float:
        """Send a rank a signal, for real; returns the monotonic time just before."""
        at = time.monotonic()
        os.kill(pid, number)
        return at

    def log_tail(self, lines: int = 15) -> str:
        """The end of the server's log."""
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def save_log(self, path: Path) -> Path:
        """Keep the server's log, which goes with it otherwise."""
        return Path(shutil.copyfile(self._log.name, path))

    def _ready(self) -> bool:
        if not self.url:
            text = Path(self._log.name).read_text(errors="replace")
            match = re.search(r"listening on (http://\S+)", text)
            if match is None:
                return False
            self.url = match.group(1)
        try:
            return plain_http.get(f"{self.url}{self.ready_path}", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
