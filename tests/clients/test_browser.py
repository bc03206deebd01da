"""A browser's `fetch` and streams, from a page of another origin."""

import json
import os
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.served import (
    ADMIN_KEY,
    CHAT,
    COMPLETIONS,
    KEY,
    MESSAGES,
    PROMPT,
    Served,
    end_group,
    greedy,
    needed,
)

pytestmark = pytest.mark.clients

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--no-proxy-server",
    # It reaches this machine and nothing else.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
ANSWER_S = 60.0
PAGE = (Path(__file__).parent / "scripts" / "page.html").read_text()


class Pages(BaseHTTPRequestHandler):
    """Serves one page, and takes what it posts."""

    def __init__(self, page: str, found: "queue.Queue[Any]", *given: Any) -> None:
        self._page, self._found = page, found
        super().__init__(*given)

    def do_GET(self) -> None:
        self._answer(self._page.encode())

    def do_POST(self) -> None:
        self._found.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: Any) -> None:
        """Nobody reads it."""


@contextmanager
def page_server(page: str) -> Iterator[tuple[str, "queue.Queue[Any]"]]:
    """Its URL, and what the page posts."""
    found: queue.Queue[Any] = queue.Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Pages, page, found)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", found
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def browser(url: str, profile: Path) -> Iterator[None]:
    program = needed("chromium", "chromium")
    given = [program, *FLAGS, f"--user-data-dir={profile}", url]
    home = {"HOME": str(profile), "XDG_CACHE_HOME": str(profile), "TMPDIR": str(profile)}
    process = subprocess.Popen(
        given, env={**os.environ, **home}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        end_group(process)


def requests(served: Served) -> dict[str, Any]:
    """What the page asks for: a name, and then path, body, key and after how many parts to stop."""
    text = greedy({"model": served.model, "prompt": PROMPT})
    chat = greedy({"model": served.model, "messages": MESSAGES})
    long = {**text, "max_tokens": 1900, "stream": True}
    pause = {"instruction": "pause"}
    return {
        "models": ["/v1/models", None, KEY],
        "text": [COMPLETIONS, text, KEY],
        "text stream": [COMPLETIONS, {**text, "max_tokens": 60, "stream": True}, KEY],
        "chat stream": [CHAT, {**chat, "max_tokens": 60, "stream": True}, KEY],
        "wrong key": [CHAT, chat, "wrong"],
        "bad request": [CHAT, {**chat, "n": 0}, KEY],
        "no such path": ["/v1/nothing", None, KEY],
        "operator": ["/v1/fault_tolerance/apply", pause, ADMIN_KEY],
        "left": [COMPLETIONS, long, KEY, 2],
    }


@pytest.fixture(scope="module")
def found(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    told = {"api": served.url, "requests": requests(served)}
    page = PAGE.replace("TOLD", json.dumps(told))
    with page_server(page) as (url, posted), browser(url, tmp_path_factory.mktemp("profile")):
        return dict(posted.get(timeout=ANSWER_S))


def text_of(answer: dict[str, Any]) -> str:
    """The text of a stream, which must be whole."""
    lines = "".join(answer["parts"]).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def test_answers(found: dict[str, Any], served: Served) -> None:
    assert json.loads("".join(found["models"]["parts"]))["data"][0]["id"] == served.model
    told, plain = json.loads("".join(found["text"]["parts"])), served.complete()
    assert (told["choices"], told["usage"]) == (plain["choices"], plain["usage"])


def test_streams_arrive_piece_by_piece(found: dict[str, Any], served: Served) -> None:
    text = served.complete(max_tokens=60)["choices"][0]["text"]
    content = served.chat(max_tokens=60)["choices"][0]["message"]["content"]
    for name, expected in (("text stream", text), ("chat stream", content)):
        answer = found[name]
        assert answer["status"] == 200
        assert answer["headers"]["content-type"].startswith("text/event-stream")
        assert text_of(answer) == expected
        assert len(answer["parts"]) > 10


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("wrong key", 401, "invalid_api_key"),
        ("bad request", 400, None),
        ("no such path", 404, None),
        ("operator", 403, "origin_not_allowed"),
    ],
)
def test_a_page_can_read_what_refuses_it(
    found: dict[str, Any], name: str, status: int, code: str | None
) -> None:
    answer = found[name]
    assert answer["status"] == status, answer
    assert json.loads("".join(answer["parts"]))["error"]["code"] == code


def test_a_stream_that_is_left_ends(found: dict[str, Any], served: Served) -> None:
    assert len(found["left"]["parts"]) == 2
    served.await_running(0)
    assert served.status()["state"] == "serving", "a page has paused it"
