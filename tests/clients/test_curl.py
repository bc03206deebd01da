"""`curl`, as documentation tells people to use it, and as they do."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pytest
from support.served import CHAT, COMPLETIONS, KEY, PROMPT, Served, end_group, greedy, needed

pytestmark = pytest.mark.clients

LIMITS = ("--max-time", "60", "--silent", "--show-error", "--noproxy", "*")


def command(served: Served, path: str, *flags: str, key: str = KEY) -> list[str]:
    keyed = ["--header", f"Authorization: Bearer {key}"]
    return [needed("curl", "curl"), *LIMITS, *keyed, *flags, served.url + path]


def posted(body: dict[str, Any]) -> list[str]:
    return ["--header", "Content-Type: application/json", "--data-binary", json.dumps(body)]


def curl(served: Served, path: str, *flags: str, key: str = KEY) -> str:
    given = command(served, path, *flags, key=key)
    ran = subprocess.run(given, capture_output=True, timeout=90, check=True)
    return ran.stdout.decode().replace("\r\n", "\n")


def head_and_body(answer: str) -> tuple[str, dict[str, str], str]:
    """Of what `-i` prints: the status line, the headers, the body."""
    head, _, body = answer.partition("\n\n")
    status, *lines = head.splitlines()
    return status, {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


def asked(served: Served, **fields: Any) -> dict[str, Any]:
    return greedy({"model": served.model, "prompt": PROMPT, **fields})


def text_of(body: str) -> str:
    """The text of a stream, which must be whole."""
    events = [line for line in body.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


@contextmanager
def streaming(served: Served, body: dict[str, Any]) -> Iterator[IO[bytes]]:
    """What `curl -N` prints, as it prints it."""
    given = command(served, COMPLETIONS, "-N", *posted({**body, "stream": True}))
    process = subprocess.Popen(given, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        with process.stdout as out:
            yield out
            end_group(process)
    finally:
        end_group(process)


def test_a_stream_arrives_piece_by_piece_and_ends_with_its_reader(served: Served) -> None:
    with streaming(served, asked(served, max_tokens=1900)) as out:
        assert out.readline().startswith(b"data: {")
        served.await_running(1)
        assert out.readline() == b"\n"
        assert out.readline().startswith(b"data: {")
        assert served.num_running() == 1, "it was over before it was read"
    served.await_running(0)


@pytest.mark.parametrize("how", ["--http1.1", "--http1.0", "--http2", "--compressed"])
def test_the_head_and_the_text_of_a_stream(served: Served, how: str) -> None:
    """`--http2` asks for an upgrade, which is not there."""
    flags = [how, "-N", "-i", *posted(asked(served, stream=True))]
    status, headers, body = head_and_body(curl(served, COMPLETIONS, *flags))
    assert status == "HTTP/1.1 200 OK"
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
    assert ("transfer-encoding" in headers) == (how != "--http1.0")
    assert text_of(body) == served.complete()["choices"][0]["text"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models"])
def test_head(served: Served, path: str) -> None:
    status, headers, body = head_and_body(curl(served, path, "-I"))
    whole = served.ask("GET", path)
    assert (status, body) == ("HTTP/1.1 200 OK", "")
    assert headers["content-type"] == whole.headers["content-type"]
    assert headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_head_where_there_is_only_post(served: Served, path: str) -> None:
    status, headers, body = head_and_body(curl(served, path, "-I"))
    assert (status, headers["allow"], body) == ("HTTP/1.1 405 Method Not Allowed", "POST", "")


@pytest.mark.parametrize("how", ["Content-Length", "Transfer-Encoding: chunked"])
def test_a_body_of_megabytes_is_sent_on_request(served: Served, how: str, tmp_path: Any) -> None:
    """curl waits for `100 Continue` before it sends so much."""
    body = tmp_path / "body.json"
    body.write_text(json.dumps(asked(served, prompt="Hello? " * 300_000)))
    header = [] if how == "Content-Length" else ["--header", how]
    kind = ["--header", "Content-Type: application/json", "--data-binary", f"@{body}"]
    answer = curl(served, COMPLETIONS, "-i", *header, *kind)
    interim, _, rest = answer.partition("\n\n")
    assert interim == "HTTP/1.1 100 Continue"
    status, _, said = head_and_body(rest)
    assert status == "HTTP/1.1 400 Bad Request"
    assert json.loads(said)["error"]["code"] == "context_length_exceeded"


def test_a_wrong_key(served: Served) -> None:
    flags = ["-i", *posted(asked(served))]
    status, _, body = head_and_body(curl(served, COMPLETIONS, *flags, key="wrong"))
    assert status == "HTTP/1.1 401 Unauthorized"
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
