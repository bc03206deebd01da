"""Clients that send slowly, go away in the middle, or do not read what they asked for."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from revivemoe.bench import plain_http
from revivemoe.server import bodies, openai_routes, sse
from revivemoe.server.admission import Admission
from revivemoe.server.lifetime import Lifetime
from revivemoe.server.run import bind
from revivemoe.streams import EngineUnavailable, FellBehind

BODY = b'{"prompt": "abc", "max_tokens": 2}'
STREAM = {"prompt": "abc", "max_tokens": 3, "stream": True}


@contextmanager
def half_a_request(url: str) -> Iterator[socket.socket]:
    address = urlsplit(url)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection((address.hostname, address.port), timeout=5)) as client:
        client.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:5])
        yield client


def eventually(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


def lifetime(server) -> Lifetime:
    return server.app.state.lifetime


def test_an_upload_that_is_broken_off_is_no_error_of_ours(start_server, caplog):
    with start_server() as server, caplog.at_level(logging.INFO):
        with half_a_request(server.url):
            assert eventually(lambda: lifetime(server).num_open)
        assert eventually(lambda: not lifetime(server).num_open)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_body_that_does_not_come_is_not_waited_for(http, server, monkeypatch):
    monkeypatch.setattr(bodies, "READ_WITHIN_S", 0.1)
    with half_a_request(server.url) as client:
        answer = b""
        while more := client.recv(4096):
            answer += more
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not come within 0.1 s" in answer


def test_a_body_that_is_coming_is_cut_too(start_server):
    with start_server() as server, half_a_request(server.url) as client:
        assert eventually(lambda: lifetime(server).num_open)
        server._loop.call_soon_threadsafe(lifetime(server).cut.set)
        client.settimeout(2)
        assert client.recv(4096).startswith(b"HTTP/1.1 503 ")


def test_a_server_that_stops_waits_for_a_body_that_is_coming(start_server):
    """And answers meanwhile: a load balancer gets its 503, not a refused connection."""
    with start_server(shutdown_timeout_s=5) as server, half_a_request(server.url) as client:
        assert eventually(lambda: lifetime(server).num_open)
        server.stop()
        assert eventually(lifetime(server).draining.is_set)
        time.sleep(0.05)
        assert plain_http.get(f"{server.url}/ready").status_code == 503
        client.sendall(BODY[5:])
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_server_that_stops_waits_for_a_stream_that_begins(start_server, monkeypatch):
    monkeypatch.setattr(openai_routes, "HEADERS_WITHIN_S", 0.15)
    with start_server(shutdown_timeout_s=5) as server, server.http() as http:
        server.engine.hold_submit = True
        stopping = threading.Thread(
            target=lambda: eventually(lambda: lifetime(server).num_open) and server.stop()
        )
        stopping.start()
        with http.stream("POST", "/v1/completions", json=STREAM) as answer:
            stopping.join()
            assert eventually(lifetime(server).draining.is_set)
            time.sleep(0.05)
            assert plain_http.get(f"{server.url}/ready").status_code == 503
            server.engine.hold_submit = False
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) == 4


class LateReply:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_reply_that_comes_although_nobody_waits_is_closed():
    reply = LateReply()

    async def deaf() -> LateReply:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return reply

    async def main() -> None:
        admission = Admission(deaf)
        await asyncio.sleep(0)
        admission.close()
        admission.close()
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert reply.closed


def test_a_refusal_within_a_stream_says_when_to_come_back():
    async def refuse() -> None:
        raise EngineUnavailable("still recovering", 7.0)

    async def main() -> None:
        await anext(Admission(refuse).events())

    with pytest.raises(Exception, match="still recovering") as refused:
        asyncio.run(main())
    assert (refused.value.code, refused.value.retry_after_s) == ("engine_unavailable", 7.0)


def test_a_client_that_reads_nothing_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(sse, "STALLED_S", 0.05)
    closed = []

    async def events():
        while True:
            yield "data: x\n\n"

    async def send(message):
        if message.get("body") == b"data: x\n\n":
            await asyncio.sleep(60)

    async def receive():
        await asyncio.sleep(60)

    response = sse.EventStream(events(), Lifetime(), lambda: closed.append(True))
    asyncio.run(asyncio.wait_for(response({"type": "http"}, receive, send), 5))
    assert closed == [True]
    assert "has read nothing for 0.05 s" in caplog.text


def test_a_reader_of_events_that_falls_behind_is_told(http, engine, monkeypatch):
    async def events():
        yield {"event": "signal"}
        raise FellBehind("17 events were not read in time")

    monkeypatch.setattr(engine, "events", events)
    with http.stream("GET", "/v1/fault_tolerance/events") as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[1:3] == ['data: {"event":"signal"}', "event: error"]
    assert "17 events were not read in time" in lines[3]
    assert '"code":"fell_behind"' in lines[3]


def test_the_kernel_gives_up_a_client_that_takes_nothing_of_a_whole_answer():
    """Connections have it from the listener; `tcp(7)`: also where the window stays shut."""
    with bind("127.0.0.1", 0) as listener, closing(socket.create_connection(_address(listener))):
        accepted, _ = listener.accept()
        with accepted:
            given_up_ms = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert given_up_ms == 300_000


def _address(listener: socket.socket) -> tuple[str, int]:
    listener.listen()
    host, port = listener.getsockname()
    return host, port
