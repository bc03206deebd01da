"""A client of the OpenAI endpoints that keeps everything an answer said, choice by choice."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from revivemoe.bench import plain_http

TIMEOUT_S = 60.0
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Request:
    """One call. `after_tokens`: held back until the load has received so many tokens."""

    path: str
    body: dict[str, Any]
    after_tokens: int = 0


@dataclass(frozen=True)
class Scored:
    """A token's log-probability and those of the likeliest tokens at its place."""

    token: str
    logprob: float | None
    top: dict[str, float]


@dataclass
class Choice:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class Answer:
    choices: dict[int, Choice] = field(default_factory=dict)
    request_id: str = ""
    prompt_token_ids: list[int] | None = None
    usage: dict[str, int] | None = None
    quality: str | None = None
    header_quality: str | None = None
    status: int = 0
    error: str | None = None
    num_ends: int = 0
    """`[DONE]` markers; a complete stream has one."""

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each choice, in order."""
        return [self.choices[index].token_ids for index in sorted(self.choices)]


class Load:
    """Streams that run at once. What happens beside them goes by the tokens that have arrived."""

    def __init__(self, url: str, requests: Sequence[Request]) -> None:
        self.url = url
        self.requests = list(requests)
        self.answers = [Answer() for _ in requests]
        self._changed = asyncio.Event()
        self._num_open = len(self.requests)

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    async def reached(self, num_tokens: int) -> None:
        """Wait until so many tokens have arrived, or every stream has ended."""
        await self.until(lambda: self.num_tokens >= num_tokens)

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait until something holds of the answers, or every stream has ended."""
        while self._num_open and not reached():
            self._changed.clear()
            await self._changed.wait()

    async def run(self, beside: Callable[["Load"], Awaitable[None]] | None = None) -> list[Answer]:
        """Run all streams to their ends, and `beside` with them."""
        limits = httpx.Limits(max_connections=None)
        async with (
            plain_http.async_client(base_url=self.url, timeout=TIMEOUT_S, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            for request, answer in zip(self.requests, self.answers, strict=True):
                group.create_task(self._stream(client, request, answer))
            if beside is not None:
                group.create_task(beside(self))
        return self.answers

    async def _stream(self, client: httpx.AsyncClient, request: Request, answer: Answer) -> None:
        try:
            if request.after_tokens:
                await self.reached(request.after_tokens)
            await self._read(client, request, answer)
        finally:
            self._num_open -= 1
            self._changed.set()

    async def _read(self, client: httpx.AsyncClient, request: Request, answer: Answer) -> None:
        body = {
            **request.body,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        async with client.stream("POST", request.path, json=body) as response:
            answer.status = response.status_code
            answer.header_quality = response.headers.get("x-revivemoe-quality")
            if response.status_code != 200:
                answer.error = (await response.aread()).decode()
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    answer.num_ends += 1
                elif line.startswith("data: "):
                    take_chunk(json.loads(line[6:]), answer)
                    self._changed.set()


def run_load(
    url: str,
    requests: Sequence[Request],
    beside: Callable[[Load], Awaitable[None]] | None = None,
) -> list[Answer]:
    """All streams at once; answers in the order of the requests."""

    async def run() -> list[Answer]:
        return await Load(url, requests).run(beside)

    return asyncio.run(run())


def complete(url: str, request: Request) -> Answer:
    """The same request answered in one body."""
    body = {**request.body, "return_token_ids": True}
    response = plain_http.post(url + request.path, json=body, timeout=TIMEOUT_S)
    answer = Answer(status=response.status_code)
    answer.header_quality = response.headers.get("x-revivemoe-quality")
    if response.status_code != 200:
        answer.error = response.text
        return answer
    take_chunk(response.json(), answer)
    answer.num_ends = 1
    return answer


def take_chunk(document: dict[str, Any], answer: Answer) -> None:
    """Add a chunk of a stream, or a whole body."""
    if "error" in document:
        answer.error = document["error"]["message"]
        return
    answer.request_id = document["id"]
    answer.usage = document.get("usage") or answer.usage
    answer.quality = document.get("quality", answer.quality)
    answer.prompt_token_ids = document.get("prompt_token_ids", answer.prompt_token_ids)
    for written in document["choices"]:
        choice = answer.choice(written["index"])
        assert choice.finish_reason is None, "a choice goes on after its end"
        said = written.get("delta") or written.get("message") or {}
        choice.text += written.get("text") or said.get("content") or ""
        choice.token_ids += written.get("token_ids") or []
        choice.scored += _scored(written.get("logprobs") or {})
        choice.finish_reason = written["finish_reason"]
        choice.stop_reason = written.get("stop_reason")
        answer.prompt_token_ids = written.get("prompt_token_ids", answer.prompt_token_ids)


def _scored(logprobs: dict[str, Any]) -> list[Scored]:
    if "content" in logprobs:  # chat
        return [
            Scored(e["token"], e["logprob"], {t["token"]: t["logprob"] for t in e["top_logprobs"]})
            for e in logprobs["content"]
        ]
    if "tokens" in logprobs:
        columns = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
        return [Scored(token, lp, top or {}) for token, lp, top in zip(*columns, strict=True)]
    return []


# ---- comparing ------------------------------------------------------------------------------


def differences(expected: Answer, got: Answer) -> list[str]:
    """What two answers to one request disagree on; log-probabilities within a tolerance."""
    found = []
    if got.error is not None:
        found.append(f"error: {got.error}")
    if got.num_ends != expected.num_ends:
        found.append(f"{got.num_ends} [DONE]")
    for name in ("usage", "prompt_token_ids", "quality", "header_quality"):
        if getattr(got, name) != getattr(expected, name):
            found.append(f"{name}: {getattr(got, name)}, not {getattr(expected, name)}")
    if got.choices.keys() != expected.choices.keys():
        return [*found, f"choices {sorted(got.choices)}, not {sorted(expected.choices)}"]
    for index, choice in got.choices.items():
        found += [f"choice {index}: {d}" for d in _differ(expected.choices[index], choice)]
    return found


def _differ(expected: Choice, got: Choice) -> list[str]:
    found = []
    for name in ("token_ids", "text", "finish_reason", "stop_reason"):
        if getattr(got, name) != getattr(expected, name):
            found.append(f"{name}: {getattr(got, name)!r}, not {getattr(expected, name)!r}")
    if len(got.scored) != len(expected.scored):
        found.append(f"{len(got.scored)} log-probabilities, not {len(expected.scored)}")
    else:
        pairs = zip(expected.scored, got.scored, strict=True)
        found += [f"logprobs at {k}: {b}, not {a}" for k, (a, b) in enumerate(pairs) if far(a, b)]
    return found


def far(a: Scored, b: Scored) -> bool:
    """Whether two entries differ by more than arithmetic noise. Near ties may change places."""
    if a.token != b.token or (a.logprob is None) != (b.logprob is None):
        return True
    pairs = list(zip(sorted(a.top.values()), sorted(b.top.values()), strict=False))
    pairs += [(a.top[token], b.top[token]) for token in a.top.keys() & b.top.keys()]
    if a.logprob is not None and b.logprob is not None:
        pairs.append((a.logprob, b.logprob))
    return len(a.top) != len(b.top) or any(abs(x - y) > LOGPROB_TOLERANCE for x, y in pairs)
