"""The server as a container runs it: as the first process of its own PID namespace."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.cases import Weights

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="PID namespaces cannot be made here")


@contextmanager
def first_process(model_dir: Path, log: Path) -> Iterator[psutil.Process]:
    """`serve` as PID 1; what is left of it is killed with `unshare`."""
    flags = ["--port", "0", "--device", "cpu", "--data-parallel-size", "2", "--max-model-len", "64"]
    command = [sys.executable, "-m", "revivemoe.cli.main", "serve", str(model_dir), *flags]
    with log.open("wb") as out:
        outer = subprocess.Popen([*UNSHARE, *command], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 10
        while not (children := psutil.Process(outer.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield children[0]
    finally:
        outer.kill()
        outer.wait()


def has_handler(process: psutil.Process) -> bool:
    """Whether SIGTERM is caught: from then on PID 1 hears it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("said", ["", "ranks"])
def test_sigterm_is_heard_at_any_moment(qwen: Weights, tmp_path: Path, said: str) -> None:
    log = tmp_path / "log"
    with first_process(qwen.dir, log) as process:
        deadline = time.monotonic() + 60
        while not (has_handler(process) if not said else said in log.read_text()):
            assert time.monotonic() < deadline, log.read_text()
            assert process.is_running(), log.read_text()
            time.sleep(0.01)
        family = process.children(recursive=True)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.wait(15)
        assert time.monotonic() - began < 5
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, alive
    assert "Traceback" not in log.read_text()
