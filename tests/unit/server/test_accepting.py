"""More clients than descriptors: those of recovery stay free, and nobody waits for ever."""

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from revivemoe.bench import plain_http
from revivemoe.host.descriptors import lowest_free
from revivemoe.server import accepting
from revivemoe.server.accepting import Acceptor

STREAM = {"prompt": "abc", "max_tokens": 40, "stream": True}


@contextmanager
def connections(url: str, number: int) -> Iterator[list[socket.socket]]:
    """That say nothing. Their own descriptors have low numbers, too: so they come first."""
    address = urlsplit(url)
    with ExitStack() as stack:
        ours = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in ours:
            each.settimeout(5)
            each.connect((address.hostname, address.port))
        yield ours


def test_idle_connections_make_room_for_those_that_ask(start_server, monkeypatch, caplog):
    monkeypatch.setattr(accepting, "IDLE_AT_LEAST_S", 0.2)
    number = 30
    below = lowest_free() + number + 25  # the server's own, and about ten of those connections
    with start_server(descriptors_below=below) as server:
        with server.http() as http, connections(server.url, number) as idle:
            began = time.monotonic()
            assert http.get("/health").status_code == 200, "from behind all the others"
            assert time.monotonic() - began < 5
            assert idle[0].recv(1) == b"", "the oldest have been closed"
        assert server.http().get("/ready").status_code == 200
    said = [r.message for r in caplog.records if "no new connections" in r.message]
    assert len(said) == 1, said
    assert lowest_free() < below


class Ours(asyncio.Protocol):
    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(b"!")

    def shutdown(self) -> None:
        self.transport.close()


def test_without_any_descriptor_it_waits_and_goes_on(caplog):
    """asyncio's own loop would log some thousand tracebacks."""
    asyncio.run(exhausted())
    assert len(caplog.records) == 1
    assert "Too many open files" in caplog.records[0].message
    assert caplog.records[0].levelno == logging.WARNING


async def exhausted() -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        client.setblocking(False)
        acceptor = Acceptor(listener, Ours, 1 << 20)
        acceptor.start()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), hard))
        try:
            await loop.sock_connect(client, listener.getsockname())
            await asyncio.sleep(3 * accepting.LOOK_S)
            assert acceptor.paused
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await asyncio.wait_for(loop.sock_recv(client, 1), 5) == b"!"
        assert not acceptor.paused
        acceptor.close()
        await acceptor.wait_closed()


def test_a_stream_under_way_is_not_closed_for_room(start_server, monkeypatch):
    monkeypatch.setattr(accepting, "IDLE_AT_LEAST_S", 0.0)
    with start_server(descriptors_below=lowest_free() + 16) as server:
        server.engine.step_s = 0.02
        with server.http() as http, http.stream("POST", "/v1/completions", json=STREAM) as answer:
            lines = answer.iter_lines()
            next(lines)
            with connections(server.url, 20) as idle:
                assert idle[0].recv(1) == b""
                assert list(lines)[-2:].count("data: [DONE]") == 1
        assert plain_http.get(f"{server.url}/health").status_code == 200


def test_the_reserve_is_nobodys_however_clients_come_and_go() -> None:
    """Whoever left made room for two: one below the reserve, and one of it."""
    asyncio.run(churn())


async def churn() -> None:
    loop, below = asyncio.get_running_loop(), lowest_free() + 30
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        taken: list[Busy] = []
        acceptor = Acceptor(listener, lambda: Busy(taken), below)
        acceptor.start()
        clients = [stack.enter_context(socket.socket()) for _ in range(60)]
        for number, client in enumerate(clients):
            os.dup2(client.fileno(), below + 200 + number)  # not among those that are counted
            client.close()
            clients[number] = stack.enter_context(socket.socket(fileno=below + 200 + number))
        for client in clients:
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
        for _ in range(20):
            await asyncio.sleep(1.2 * accepting.LOOK_S)
            numbers = [each.transport.get_extra_info("socket").fileno() for each in taken]
            assert max(numbers) < below
            taken.pop(0).transport.close()
        assert len(taken) > 5
        acceptor.close()
        for each in taken:
            each.transport.close()
        await acceptor.wait_closed()


class Busy(asyncio.Protocol):
    """With a request under way: it does not make room."""

    def __init__(self, taken: list["Busy"]) -> None:
        self._taken = taken

    def connection_made(self, transport) -> None:
        self.transport = transport
        self._taken.append(self)

    def shutdown(self) -> None: ...
