"""A served checkpoint with keys, and clients of other projects that are tried against it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.deployment import Deployment

from revivemoe.bench import plain_http

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "clients" / "scripts"
KEY, ADMIN_KEY = "the-key", "the-admin-key"
PROMPT = "When a device fails"
MESSAGES = [{"role": "user", "content": "Hello?"}]
CLIENT_S = 90.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Served:
    """What plain httpx gets from it: the measure of every client."""

    deployment: Deployment
    model: str
    model_dir: Path

    @property
    def url(self) -> str:
        return self.deployment.url

    def ask(self, method: str, path: str, key: str = KEY, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return plain_http.request(method, self.url + path, headers=headers, timeout=60, **more)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.ask("POST", path, json={"model": self.model, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def complete(self, prompt: Any = PROMPT, **body: Any) -> dict[str, Any]:
        """Greedy, and to the end of `max_tokens`."""
        return self.post(COMPLETIONS, prompt=prompt, **greedy(body))

    def chat(self, content: str = "Hello?", **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return self.post(CHAT, messages=messages, **greedy(body))

    def tokens(self, text: str) -> list[int]:
        answer = self.ask("POST", "/tokenize", json={"prompt": text})
        return list(answer.json()["tokens"])

    def apply(self, instruction: str) -> None:
        answer = self.ask(
            "POST", "/v1/fault_tolerance/apply", ADMIN_KEY, json={"instruction": instruction}
        )
        assert answer.status_code == 202, answer.text

    def status(self) -> dict[str, Any]:
        return dict(self.ask("GET", "/v1/fault_tolerance/status").json())

    def num_running(self) -> int:
        return sum(int(engine["running"]) for engine in self.status()["engines"])

    def await_running(self, number: int, within_s: float = 10.0) -> None:
        """So many sequences run."""
        deadline = time.monotonic() + within_s
        while self.num_running() != number:
            assert time.monotonic() < deadline, f"never {number}: {self.status()}"
            time.sleep(0.05)


def greedy(body: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **body}


def run_client(script: str, served: Served, *arguments: str, url: str = "") -> Any:
    """What a script of `tests/clients/scripts` prints, run with the clients' own interpreter.

    `url`: of what stands in front of the server.
    """
    file, url = SCRIPTS / f"{script}.py", url or served.url
    given = [str(PYTHON), str(file), url, served.model, *arguments]
    with tempfile.TemporaryDirectory(prefix="client-", ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            given, env=environment(home), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=CLIENT_S)
        finally:
            end_group(process)
    assert process.returncode == 0, f"{script}: {err[-3000:]}"
    return json.loads(out.splitlines()[-1])


def end_group(process: subprocess.Popen[Any]) -> None:
    """End it with whatever it has started. It must lead a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(home: str) -> dict[str, str]:
    """Nothing that is not here is asked for, and what is written lies in a folder that goes."""
    offline = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "LANGSMITH_TRACING": "false"}
    within = {"HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "HF_HOME": f"{home}/hub-home"}
    return {**os.environ, **within, **offline, **quiet, "OPENAI_API_KEY": KEY}


def needed(program: str, package: str) -> str:
    """The path of a program that is not Python's; skips the test where it is missing."""
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        pytest.skip(f"{program} is missing: apt-get install {package}")
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
