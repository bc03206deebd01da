import asyncio
import socket
import time

import openai
import pytest
from unit.server.fake_engine import FakeEngine

from revivemoe.server import create_app, serve_app
from revivemoe.server.lifetime import Lifetime
from revivemoe.server.sse import EventStream

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 200}


def eventually(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_client_that_leaves_a_stream_aborts_it(client, engine):
    engine.step_s = 0.02
    stream = client.completions.create(**LONG, stream=True)
    next(iter(stream))
    assert not engine.streams[0].closed.is_set()
    stream.close()
    assert eventually(engine.streams[0].closed.is_set)
    assert not engine.streams[0].ended


def test_a_client_that_leaves_before_the_first_token_aborts_the_stream(http, engine):
    engine.step_s = 3600
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
        pass
    assert eventually(engine.streams[0].closed.is_set)


def test_a_client_that_leaves_a_whole_request_aborts_it(http, engine):
    engine.step_s = 0.02
    with pytest.raises(Exception, match="timed out"):
        http.post("/v1/completions", json=LONG, timeout=0.2)
    assert eventually(engine.streams[0].closed.is_set)
    assert not engine.streams[0].ended


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_to_be_admitted(http, engine, stream):
    engine.hold_submit = True
    with pytest.raises(Exception, match="timed out"):
        http.post("/v1/completions", json={**LONG, "stream": stream}, timeout=0.2)
    assert eventually(lambda: engine.submit_cancelled)
    assert engine.submissions == []


def test_streams_run_side_by_side(server, engine, tokenizer):
    engine.step_s = 0.001

    async def one(client, k) -> str:
        text = ""
        prompt = f"{k:02}"
        chunks = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, stream=True
        )
        async for chunk in chunks:
            text += chunk.choices[0].text
        assert text == prompt * 20
        return text

    async def many() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", timeout=20) as client:
            return await asyncio.gather(*(one(client, k) for k in range(50)))

    assert len(set(asyncio.run(many()))) == 50


def test_stopping_lets_short_streams_finish(start_server):
    with start_server(shutdown_timeout_s=3) as server, server.openai() as client:
        server.engine.step_s = 0.05
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=10, stream=True)
        text = next(iter(stream)).choices[0].text
        server.stop()
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "x" * 10
        server.join()


def test_stopping_cuts_long_streams_with_an_error_in_bounded_time(start_server):
    with start_server() as server, server.openai() as client, server.http() as http:
        server.engine.step_s = 0.05
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        with http.stream("GET", "/v1/fault_tolerance/events") as events:
            began = time.monotonic()
            server.stop()
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            assert list(events.iter_lines())[-1] == ""
        server.join()
        assert time.monotonic() - began < 2
        assert server.engine.streams[0].closed.is_set()


def test_stopping_ends_the_events_at_once(start_server):
    with start_server(shutdown_timeout_s=5) as server, server.http() as http:
        with http.stream("GET", "/v1/fault_tolerance/events") as events:
            lines = events.iter_lines()
            next(lines)
            began = time.monotonic()
            server.stop()
            assert not any(line.startswith("event: error") for line in lines)
        server.join()
        assert time.monotonic() - began < 3


def test_a_stream_whose_client_left_before_it_began_is_closed():
    closed = []

    async def events():
        yield "never"

    async def send(message):
        raise OSError("gone")

    async def receive():
        return {"type": "http.disconnect"}

    response = EventStream(events(), Lifetime(), lambda: closed.append(True))
    with pytest.raises(OSError, match="gone"):
        asyncio.run(response({"type": "http"}, receive, send))
    assert closed == [True]


def test_stopping_answers_whole_requests_with_503(start_server):
    with start_server() as server, server.http() as http:
        server.engine.hold_submit = True

        async def ask():
            reply = asyncio.create_task(asyncio.to_thread(http.post, "/v1/completions", json=LONG))
            await asyncio.sleep(0.2)
            server.stop()
            return await reply

        assert asyncio.run(ask()).status_code == 503
        assert server.engine.submit_cancelled


def test_a_port_in_use_is_an_error_that_names_it(tokenizer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        app = create_app(FakeEngine(tokenizer), tokenizer)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            asyncio.run(serve_app(app, "127.0.0.1", port, stop=asyncio.Event()))


def test_nothing_is_written_to_standard_output(start_server, capfd):
    with start_server() as server, server.openai() as client:
        client.completions.create(model="tiny", prompt="x")
    assert capfd.readouterr().out == ""
