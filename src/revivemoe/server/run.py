"""Runs the application inside an event loop that is already there, and stops it in bounded time."""

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from fastapi import FastAPI

from revivemoe.host.descriptors import CEILING
from revivemoe.server.accepting import Acceptor
from revivemoe.server.lifetime import Lifetime
from revivemoe.server.sse import STALLED_S

_LAST_WORDS_S = 1.0
"""Time for the error events of the streams that were cut to be written."""


class _Server(uvicorn.Server):
    """Leaves the signals to whoever runs the loop, and accepts in its own way."""

    def __init__(self, config: uvicorn.Config, descriptors_below: int) -> None:
        super().__init__(config)
        self._descriptors_below = descriptors_below

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        (listener,) = sockets or []
        acceptor = Acceptor(listener, self._connection, self._descriptors_below)
        self.servers = [cast(asyncio.Server, acceptor)]
        acceptor.start()
        self.started = True

    def _connection(self) -> asyncio.Protocol:
        protocol = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        return protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 lets the system choose. Of the addresses of a name the first that can
    be had: `localhost` may be known as `::1` where there is no IPv6. Raises OSError naming host and
    port."""
    why = OSError("no address")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                return _bound(socket.socket(family, kind, protocol), address)
            except OSError as error:
                why = error
    except OSError as error:
        why = error
    said = f"cannot listen on {host}:{port}: {why.strerror}; choose another --host or --port"
    raise OSError(why.errno, said) from why


def _bound(sock: socket.socket, address: tuple[object, ...]) -> socket.socket:
    """Closed if it cannot be."""
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of every connection: one that takes nothing of what there is to take is given up.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STALLED_S))
        sock.bind(address)
        on_error.pop_all()
        return sock


async def serve_app(
    app: FastAPI,
    host: str,
    port: int,
    *,
    stop: asyncio.Event,
    on_started: Callable[[str, int], None] = lambda host, port: None,
    shutdown_timeout_s: float = 30.0,
    keep_alive_timeout_s: float = 75.0,
    descriptors_below: int | None = None,
) -> None:
    """Serve until `stop` is set; returns at most `shutdown_timeout_s` + 2 s after that.

    From then on `/ready` and new requests get 503, and streams go on to their end; those still open
    when the time is over, or once `app.state.lifetime.cut` is set, end with an error event.
    `keep_alive_timeout_s`: for idle connections. `on_started` gets the host and the port in use
    once requests are accepted. `descriptors_below`: the numbers of descriptors that clients may
    have; None: all. Raises OSError when it cannot listen.
    """
    below = CEILING if descriptors_below is None else descriptors_below
    with bind(host, port) as listener:
        server = _Server(_config(app, shutdown_timeout_s, keep_alive_timeout_s), below)
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
        try:
            await _until_started(server, serving)
            on_started(host, listener.getsockname()[1])
            await _first_of(serving, stop)
        finally:
            await _shut_down(server, serving, app.state.lifetime, shutdown_timeout_s)
        if not serving.cancelled():
            serving.result()


def _config(app: FastAPI, shutdown_timeout_s: float, keep_alive_timeout_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(shutdown_timeout_s + _LAST_WORDS_S),
        timeout_keep_alive=math.ceil(keep_alive_timeout_s),
    )


async def _until_started(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if serving.done():
        await serving


async def _first_of(serving: asyncio.Task[None], stop: asyncio.Event) -> None:
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()


async def _shut_down(
    server: uvicorn.Server, serving: asyncio.Task[None], lifetime: Lifetime, timeout_s: float
) -> None:
    lifetime.draining.set()
    until = time.monotonic() + timeout_s
    if not serving.done():
        await lifetime.wait_done(timeout_s)
    server.should_exit = True
    left_s = max(0.0, until - time.monotonic())
    cut = asyncio.ensure_future(lifetime.cut.wait())
    await asyncio.wait({serving, cut}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
    cut.cancel()
    open_still = not serving.done()
    lifetime.cut.set()
    if open_still:
        await asyncio.wait({serving}, timeout=2 * _LAST_WORDS_S)
    if not serving.done():
        serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
