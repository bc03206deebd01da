"""Debian's nginx in front, told nothing but `proxy_pass`: streams pass, and outlive pauses."""

import json
import os
import pwd
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served import (
    CHAT,
    COMPLETIONS,
    KEY,
    MESSAGES,
    PROMPT,
    Served,
    end_group,
    free_port,
    greedy,
    needed,
    run_client,
)

pytestmark = pytest.mark.clients

PAUSE_S = 70.0
"""Longer than nginx waits for a silent server (`proxy_read_timeout`, 60 s)."""
SILENT_S = 25.0
"""A stream says something every 10 s, through nginx, too."""
CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
user {user};
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {url};
        }}
    }}
}}
"""
"""What is not `proxy_pass` says where its files lie."""


@pytest.fixture(scope="module")
def front(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an nginx in front of the server."""
    program, folder, port = (
        needed("nginx", "nginx-light"),
        tmp_path_factory.mktemp("x"),
        free_port(),
    )
    user = pwd.getpwuid(os.getuid()).pw_name
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, user=user, port=port, url=served.url))
    log = folder / "error.log"
    given = [program, "-p", str(folder), "-c", str(config), "-e", str(log)]
    process = subprocess.Popen(given, start_new_session=True, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        await_front(url, process, log)
        yield url
    finally:
        process.terminate()
        end_group(process)


def await_front(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


def asked(served: Served, **fields: Any) -> dict[str, Any]:
    return greedy({"model": served.model, "prompt": PROMPT, **fields})


def post(front: str, path: str, body: dict[str, Any], key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(front + path, json=body, headers=headers, timeout=100)


class Reader:
    """A stream read through nginx in a thread: what came, and when."""

    def __init__(self, front: str, body: dict[str, Any]) -> None:
        self.parts: list[str] = []
        self.times: list[float] = []
        self.comments = 0
        self.some = threading.Event()
        self._asked: dict[str, Any] = {"url": front + COMPLETIONS, "json": {**body, "stream": True}}

    def read(self) -> str:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", **self._asked, headers=headers, timeout=SILENT_S) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return "".join(self.parts)
                self._take(line)
        raise AssertionError(f"it ended without [DONE] after {self.parts}")

    def _take(self, line: str) -> None:
        self.comments += line.startswith(":")
        if line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            self.parts += [choice["text"] for choice in chunk["choices"]]
            self.times.append(time.monotonic())
        if len(self.parts) == 3:
            self.some.set()

    def longest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def test_answers_and_errors(served: Served, front: str) -> None:
    whole = post(front, COMPLETIONS, asked(served)).json()
    plain = served.complete()
    assert (whole["choices"], whole["usage"]) == (plain["choices"], plain["usage"])
    body = greedy({"model": served.model, "messages": MESSAGES})
    assert post(front, CHAT, body).json()["choices"] == served.chat()["choices"]
    assert post(front, CHAT, body, key="wrong").status_code == 401
    assert post(front, CHAT, {**body, "n": 0}).json()["error"]["param"] == "n"


def test_a_stream_arrives_piece_by_piece_and_ends_with_its_reader(
    served: Served, front: str
) -> None:
    body = asked(served, max_tokens=1900, stream=True)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", front + COMPLETIONS, json=body, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        served.await_running(1)
    served.await_running(0)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("libraries")
def test_a_pause_longer_than_nginx_waits(served: Served, front: str) -> None:
    """Streams of before and of meanwhile come whole; a body is told why."""
    body = asked(served, max_tokens=600)
    before, late = Reader(front, body), Reader(front, body)
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(before.read)]
        assert before.some.wait(20)
        with paused(served):
            refused = pool.submit(run_client, "openai_paused_client", served, url=front)
            plain = pool.submit(post, front, COMPLETIONS, body)
            reading.append(pool.submit(late.read))
            time.sleep(PAUSE_S)
            assert not late.parts
        texts = [one.result(60) for one in reading]
    assert texts == [served.complete(max_tokens=600)["choices"][0]["text"]] * 2
    assert before.longest_gap_s() > PAUSE_S
    assert before.comments >= PAUSE_S // 10 - 1
    assert late.comments >= PAUSE_S // 10 - 1
    check_refused(refused.result(0), plain.result(0))
    served.await_running(0)


def check_refused(told: list[Any], plain: httpx.Response) -> None:
    """By the server, not by nginx: a new body waits for 55 s. What `openai` raises, and why."""
    body, stream = told
    assert (body["class"], body["status_code"]) == ("InternalServerError", 503)
    assert "still paused after 55 s" in body["message"]
    assert body["code"] == "engine_unavailable"
    assert isinstance(stream, str), stream
    assert (plain.status_code, plain.headers["retry-after"]) == (503, "5")
    assert plain.json()["error"]["message"] == "still paused after 55 s"


@contextmanager
def paused(served: Served) -> Iterator[None]:
    served.apply("pause")
    try:
        await_state(served, "paused")
        yield
    finally:
        served.apply("resume")


def await_state(served: Served, state: str) -> None:
    deadline = time.monotonic() + 10
    while served.status()["state"] != state:
        assert time.monotonic() < deadline
        time.sleep(0.02)
