"""Streams as proxies see them."""

import threading
import time

import pytest

from revivemoe.server import errors, sse
from revivemoe.serving.instance import ADMISSION_WAIT_S
from revivemoe.streams import EngineUnavailable

BODY = {"prompt": "abc", "max_tokens": 3, "stream": True}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_headers_come_at_once_while_the_instance_recovers(http, engine, path):
    engine.hold_submit = True
    began = time.monotonic()
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}
    body = body if "chat" in path else BODY
    with http.stream("POST", path, json=body) as answer:
        assert time.monotonic() - began < 1.5
        assert answer.status_code == 200
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-cache"
        engine.hold_submit = False
        assert list(answer.iter_lines())[-2] == "data: [DONE]"


def test_a_comment_whenever_there_is_nothing_to_say(http, engine, monkeypatch):
    monkeypatch.setattr(
        sse.EventStream.__init__, "__defaults__", (lambda: None, None, sse.DONE, 0.1)
    )
    engine.step_s = 0.35
    with http.stream("POST", "/v1/completions", json=BODY) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.count(": keep-alive") >= 6
    assert len([line for line in lines if line.startswith("data: {")]) == 3


def test_comments_are_at_most_15_s_apart():
    assert sse.KEEP_ALIVE_S <= 15


def test_the_server_refuses_before_proxies_give_up():
    """nginx and most load balancers answer 504 for a server that is silent for 60 s."""
    assert ADMISSION_WAIT_S <= 55


def test_a_refusal_that_comes_late_is_an_event(http, engine):
    engine.hold_submit = True

    def fail() -> None:
        time.sleep(1)
        engine.refuse_held = EngineUnavailable("still recovering after 55 s", 5.0)

    threading.Thread(target=fail, daemon=True).start()
    with http.stream("POST", "/v1/completions", json=BODY) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0] == "event: error"
    assert "still recovering" in lines[1]
    assert lines[-1] == "data: [DONE]"


def test_a_refusal_at_once_is_a_status(http, engine):
    engine.unavailable = EngineUnavailable("failed", 3.0)
    answer = http.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


def test_a_client_that_goes_while_it_waits_is_forgotten(http, engine):
    engine.hold_submit = True
    with http.stream("POST", "/v1/completions", json=BODY) as answer:
        assert answer.status_code == 200
    deadline = time.monotonic() + 5
    while not engine.submit_cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_streams_end_by_themselves_after_the_signal(start_server):
    with start_server(shutdown_timeout_s=10) as server, server.http() as http:
        server.engine.step_s = 0.3
        with http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 5}) as answer:
            server.stop()
            time.sleep(0.3)
            assert http.get("/ready").status_code == 503
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/completions", json=BODY)
            assert refused.status_code == 503
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert not any(line.startswith("event: error") for line in lines)
        assert len([line for line in lines if line.startswith("data: {")]) == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "apart"),
    [
        ({"n": 1}, False),
        ({"n": 16}, True),
        ({"logprobs": 15}, True),
    ],
)
def test_what_takes_long_to_write_is_written_beside_the_loop(
    http, server, monkeypatch, fields, apart, stream
):
    """Every choice echoes the prompt, every token has its alternatives."""
    threads = set()
    dumps = errors.dumps

    def watched(document):
        if "choices" in document and len(str(document)) > 300:
            threads.add(threading.get_ident())
        return dumps(document)

    monkeypatch.setattr(errors, "dumps", watched)
    monkeypatch.setattr(sse, "dumps", watched)
    body = {"prompt": [65] * 200, "echo": True, "max_tokens": 1, "stream": stream, **fields}
    assert http.post("/v1/completions", json=body).is_success
    if apart and stream and "n" in fields:
        apart = False  # a chunk has one choice
    assert (server._thread.ident in threads) != apart
