"""Streams that never end: each is checked, and none may hang."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest

from revivemoe.bench.soak import load as load_module
from revivemoe.bench.soak.load import Load, Request
from revivemoe.bench.soak.violations import Violations

EXPECTED = [5, 6, 7]
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


def answer(tokens: list[int], **more: object) -> httpx.Response:
    chunks = [{"id": "r", "choices": [{"token_ids": [t]}]} for t in tokens]
    chunks.append({"id": "r", "choices": [{"token_ids": [], "finish_reason": "length"}]})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, *([more] if more else [])]]
    return httpx.Response(200, text="".join(lines))


def loaded(handler: Handler, streams: int = 2, rounds: int = 6) -> tuple[Load, Violations]:
    """A load until so many streams were asked for."""
    violations, asked = Violations(), 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return await handler(request)

    async def run() -> Load:
        transport = httpx.MockTransport(count)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            load = Load(client, [Request({"prompt": [1]}, EXPECTED)], streams, violations)
            while asked < rounds:
                await asyncio.sleep(0)
            await load.end()
            return load

    return asyncio.run(run()), violations


def test_what_is_as_expected_is_counted() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        return answer(EXPECTED)

    load, violations = loaded(handler)
    assert load.tally.done >= 6
    assert load.tally.tokens == 3 * load.tally.done
    assert (load.tally.failed, load.tally.wrong) == (0, 0)
    assert violations.lines == []


def test_another_token_is_wrong() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        return answer([5, 9, 7])

    load, violations = loaded(handler)
    assert load.tally.wrong == load.tally.done
    assert "[9, 7], not [6, 7]" in violations.lines[0]


def test_errors_of_all_kinds_fail() -> None:
    number = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal number
        number += 1
        match number:
            case 1:
                return httpx.Response(503, text="not now")
            case 2:
                return answer([5], error={"message": "lost"})
            case 3:
                raise httpx.ReadError("cut")
        return answer(EXPECTED)

    load, violations = loaded(handler)
    assert load.tally.failed == 3
    for line, told in zip(sorted(violations.lines), ("not now", "lost", "cut"), strict=True):
        assert told in line


def test_a_stream_that_hangs_is_told_of_and_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "SILENT_FOR_S", 0.05)
    monkeypatch.setattr(load_module, "LOOKS_EVERY_S", 0.01)

    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    load, violations = loaded(handler, rounds=2)
    assert load.tally.failed == 2
    assert "2 streams did not end" in violations.lines[-1]
    assert "is silent for" in " ".join(violations.lines)
