import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
from unit.server.fake_engine import FakeEngine
from unit.server.tiny_tokenizer import tiny_tokenizer

from revivemoe.bench import plain_http
from revivemoe.server import create_app, serve_app


class RunningServer:
    """A real server on a port of its own, in a thread of its own."""

    def __init__(self, engine: FakeEngine, **options) -> None:
        self.engine = engine
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        limits = {
            name: self._options.pop(name, default)
            for name, default in [
                ("shutdown_timeout_s", 0.2),
                ("keep_alive_timeout_s", 75.0),
                ("descriptors_below", None),
            ]
        }
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.app = create_app(self.engine, self.engine.tokenizer, **self._options)
        await serve_app(
            self.app,
            "127.0.0.1",
            0,
            stop=self._stop,
            on_started=self._on_started,
            **limits,
        )

    def _on_started(self, host: str, port: int) -> None:
        self.url = f"http://{host}:{port}"
        self._started.set()

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive(), "the server did not stop"

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
        return plain_http.client(base_url=self.url, headers=headers, timeout=10)


@contextmanager
def running(engine: FakeEngine, **options) -> Iterator[RunningServer]:
    server = RunningServer(engine, **options)
    server.start()
    yield server
    server.stop()
    server.join()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def shared_server(tokenizer):
    with running(FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(shared_server):
    shared_server.engine.reset()
    return shared_server


@pytest.fixture
def engine(server):
    return server.engine


@pytest.fixture
def client(server):
    with server.openai() as client:
        yield client


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http


@pytest.fixture
def start_server(tokenizer):
    """A server with options of its own."""

    @contextmanager
    def start(**options):
        with running(FakeEngine(tokenizer), **options) as server:
            yield server

    return start
