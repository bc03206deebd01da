"""Streams requests to a running server and keeps what came back and when. For demo and benches."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx

from revivemoe.bench import plain_http
from revivemoe.bench.documents import Chunk

Body = dict[str, object]
"""Of a completion request."""


def random_prompts(draw: random.Random, count: int, length: int) -> list[list[int]]:
    """Token ids that every preset has, none of them special."""
    return [[draw.randrange(16, 500) for _ in range(length)] for _ in range(count)]


def greedy(model_dir: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Body]:
    """Completions of exactly so many tokens, none of them drawn."""
    return [
        {
            "model": model_dir.name,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for prompt in prompts
    ]


@dataclass
class StreamResult:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    """Monotonic arrival time of each token, seconds."""
    started: float = 0.0
    request_id: str = ""
    finish_reason: str | None = None
    quality: str | None = None
    error: str | None = None

    def longest_gap_s(self, after: float = 0.0) -> float:
        """Longest time between two consecutive tokens that ended later than `after`."""
        return max(gaps([self], after), default=0.0)


def gaps(results: Sequence[StreamResult], after: float = 0.0) -> list[float]:
    """Times between consecutive tokens that ended later than `after`."""
    return [b - a for r in results for a, b in pairwise(r.times) if b > after]


async def stream_completion(
    client: httpx.AsyncClient, body: Body, into: StreamResult | None = None
) -> StreamResult:
    """POST /v1/completions with `stream`; `into` may be watched while it fills."""
    result = into if into is not None else StreamResult()
    result.started = time.monotonic()
    request = {**body, "stream": True, "return_token_ids": True}
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code != 200:
            result.error = (await response.aread()).decode()
            return result
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                _take(json.loads(line[6:]), result)
    return result


def _take(chunk: Chunk, result: StreamResult) -> None:
    if "error" in chunk:
        result.error = chunk["error"]["message"]
        return
    result.request_id = chunk.get("id", result.request_id)
    result.quality = chunk.get("quality", result.quality)
    for choice in chunk.get("choices", []):
        ids = choice.get("token_ids") or []
        now = time.monotonic()
        result.token_ids.extend(ids)
        result.times.extend([now] * len(ids))
        result.text += choice.get("text") or ""
        result.finish_reason = choice.get("finish_reason") or result.finish_reason


def warm(url: str, bodies: Sequence[Body]) -> list[StreamResult]:
    """What they yield when they are streamed for the second time."""
    asyncio.run(stream_all(url, bodies, timeout_s=300))
    return asyncio.run(stream_all(url, bodies, timeout_s=300))


async def stream_all(
    url: str,
    bodies: Sequence[Body],
    into: Sequence[StreamResult] | None = None,
    timeout_s: float = 120.0,
) -> list[StreamResult]:
    """All completions at once; results in order."""
    results = list(into) if into is not None else [StreamResult() for _ in bodies]
    limits = httpx.Limits(max_connections=None)
    async with plain_http.async_client(base_url=url, timeout=timeout_s, limits=limits) as client:
        await asyncio.gather(
            *(stream_completion(client, b, r) for b, r in zip(bodies, results, strict=True))
        )
    return results
