"""From the engine's stream to the answer of a request: one body, or chunks as they come.

What a choice looks like is the endpoint's (`Shape`); the rest is the same for both.
"""

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from revivemoe.server.aside import aside
from revivemoe.server.errors import ApiError, Json
from revivemoe.server.sse import event
from revivemoe.streams import Delta, PromptLogprobsReady, Stream, StreamFailed, Submission

DEGRADED = "degraded"
_INLINE_TOKENS = 2048
T = TypeVar("T")


def joined(deltas: Sequence[Delta]) -> Delta:
    """Everything that one choice generated, in one."""
    return replace(
        deltas[-1],
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        pieces=tuple(piece for delta in deltas for piece in delta.pieces),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )


class Shape(Protocol):
    """How an endpoint writes its choices."""

    kind: str
    chunk_kind: str
    echoes: bool
    """The answer tells the prompt's tokens."""

    def note_prompt_logprobs(self, ready: PromptLogprobsReady) -> None: ...

    def choice(self, whole: Delta) -> dict[str, object]:
        """A finished choice of the body."""

    def body_extra(self) -> dict[str, object]:
        """Further fields of the body, and of the first chunk of each choice."""

    def chunks(self, delta: Delta, first: bool) -> Iterable[dict[str, object]]:
        """Chunk choices for new output; none when there is nothing to show yet."""


@dataclass
class Reply:
    """One request's answer. Use either `body` or `events`, once."""

    _submission: Submission
    _stream: Stream
    _shape: Shape
    _model: str
    _include_usage: bool = False
    _continuous_usage: bool = False
    _discard_output: bool = False
    _created: int = field(default_factory=lambda: int(time.time()))
    _degraded: bool = False
    _num_output: int = 0
    _output_of: Counter[int] = field(default_factory=Counter)
    """Tokens of each choice."""

    @property
    def headers(self) -> dict[str, str]:
        return {"x-revivemoe-quality": DEGRADED} if self._stream.degraded_from_start else {}

    async def response(self) -> Json:
        """The whole answer. Raises ApiError when the stream fails."""
        choices = await self._choices()

        def write() -> Json:
            return Json(self._body(choices), headers=self.headers)

        return await self._written(write, len(choices) + self._num_output, len(choices))

    async def _choices(self) -> list[list[Delta]]:
        """All deltas of each choice."""
        total = len(self._submission.prompts) * self._submission.n
        choices: list[list[Delta]] = [[] for _ in range(total)]
        async with aclosing(self._deltas()) as received:
            async for delta in received:
                choices[delta.index].append(delta)
        return choices

    def _body(self, choices: Sequence[Sequence[Delta]]) -> dict[str, object]:
        return {
            **self._head(self._shape.kind),
            "choices": [self._shape.choice(joined(deltas)) for deltas in choices],
            "usage": self._usage(),
            **self._shape.body_extra(),
            **self._quality(),
        }

    async def events(self) -> AsyncGenerator[str, None]:
        """Chunks as server-sent events. Raises ApiError when the stream fails."""
        started: set[int] = set()
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                for chunk in await self._chunks(delta, delta.index not in started):
                    started.add(delta.index)
                    yield chunk
        if self._include_usage:
            head = self._head(self._shape.chunk_kind)
            yield event({**head, "choices": [], "usage": self._usage(), **self._quality()})

    async def _chunks(self, delta: Delta, first: bool) -> list[str]:
        """`first`: nothing has been sent of its choice."""

        def write() -> list[str]:
            choices = enumerate(self._shape.chunks(delta, first))
            return [self._chunk(c, delta.index, first and k == 0) for k, c in choices]

        return await self._written(write, len(delta.token_ids), int(first))

    async def _written(self, write: Callable[[], T], num_output: int, num_echoes: int) -> T:
        """What `write` makes of so many tokens, and so many prompts."""
        submission = self._submission
        longest = max(map(len, submission.prompts)) if self._shape.echoes else 0
        alternatives = submission.params.prompt_logprobs or submission.params.logprobs or 0
        size = (num_output + longest * num_echoes) * (1 + alternatives)
        return await aside(write, size, _INLINE_TOKENS)

    def close(self) -> None:
        self._stream.close()

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        """Every delta until all choices are finished; the stream is closed however this ends."""
        unfinished = len(self._submission.prompts) * self._submission.n
        try:
            async with aclosing(self._received()) as received:
                async for delta in received:
                    unfinished -= delta.finish_reason is not None
                    yield delta
                    if not unfinished:
                        return
        finally:
            self.close()
        raise ApiError("the engine ended the stream before it was finished", 500)

    async def _received(self) -> AsyncGenerator[Delta, None]:
        async for item in self._stream:
            match item:
                case Delta():
                    yield self._noted(item)
                case PromptLogprobsReady():
                    self._shape.note_prompt_logprobs(item)
                case StreamFailed(message, status):
                    raise ApiError(message, status, code="generation_failed")

    def _noted(self, delta: Delta) -> Delta:
        self._degraded = self._degraded or delta.degraded
        if self._discard_output:
            end = delta.finish_reason and "length"
            return replace(
                delta,
                token_ids=(),
                text="",
                pieces=(),
                logprobs=(),
                finish_reason=end,
                stop_reason=None,
            )
        self._num_output += len(delta.token_ids)
        self._output_of[delta.index] += len(delta.token_ids)
        return delta

    def _chunk(self, choice: dict[str, object], index: int, first: bool) -> str:
        chunk = {**self._head(self._shape.chunk_kind), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = self._usage_of(index) if self._continuous_usage else None
        if first:
            chunk.update(self._shape.body_extra())
        if choice["finish_reason"] is not None:
            chunk.update(self._quality())
        return event(chunk)

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self._submission.request_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _usage(self) -> dict[str, int]:
        """Of the whole request."""
        num_prompt = sum(len(prompt) for prompt in self._submission.prompts)
        return _usage(num_prompt, self._num_output)

    def _usage_of(self, index: int) -> dict[str, int]:
        """Of one choice so far."""
        num_prompt = len(self._submission.prompts[index // self._submission.n])
        return _usage(num_prompt, self._output_of[index])

    def _quality(self) -> dict[str, str]:
        degraded = self._degraded or self._stream.degraded_from_start
        return {"quality": DEGRADED} if degraded else {}


def _usage(num_prompt: int, num_output: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
