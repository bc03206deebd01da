"""A serving engine in memory: each choice says what the test's script tells it to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.stop_strings import Stops
from revivemoe.engine.token_log import TokenLog
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.streams import (
    EngineUnavailable,
    ModelInfo,
    PromptLogprobsReady,
    StreamEvent,
    StreamFailed,
    Submission,
    choice_indices,
)

Script = Callable[[Sequence[int], int], list[int]]


def fake_logprobs(token_id: int, num_top: int | None) -> TokenLogprobs | None:
    if num_top is None:
        return None
    top = [(token_id - k, -0.5 - k) for k in range(num_top)]
    return TokenLogprobs(-0.5, top)


class FakeStream:
    def __init__(self, engine: "FakeEngine", submission: Submission) -> None:
        self.degraded_from_start = engine.degraded_from_start
        self.closed = asyncio.Event()
        self.ended = False
        self._engine = engine
        self._submission = submission

    def close(self) -> None:
        self.closed.set()

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        for index, prompt in enumerate(self._submission.prompts):
            num_top = self._submission.params.prompt_logprobs
            if num_top is not None and len(prompt) > 1:
                entries = tuple(fake_logprobs(i, num_top) for i in prompt[1:])
                yield PromptLogprobsReady(index, entries)
        async for delta in self._deltas():
            yield delta
        self.ended = True

    async def _deltas(self) -> AsyncIterator[StreamEvent]:
        engine, submission = self._engine, self._submission
        vocabulary = Vocabulary(engine.tokenizer)
        stops = Stops(submission.stop, vocabulary.specials, submission.skip_special_tokens)
        logs = [
            TokenLog(
                k,
                submission.prompts[p],
                replace_choice(submission, c),
                stops,
                vocabulary.detokenizer(submission.prompts[p], submission.skip_special_tokens),
                engine.model.max_model_len,
                engine.degraded_from_start,
            )
            for k, (p, c) in enumerate(choice_indices(submission.prompts, submission.n))
        ]
        sources = [engine.script(log.prompt_ids, log.params.choice) for log in logs]
        step = 0
        while any(not log.sealed for log in logs):
            if engine.fail_at_step == step:
                yield StreamFailed("rank 2 is gone for good", 503)
                return
            await asyncio.sleep(engine.step_s)
            for log, source in zip(logs, sources, strict=True):
                if engine.degraded_at_step == step:
                    log.mark_degraded()
                token = source[step % len(source)]
                delta = log.append(step, token, fake_logprobs(token, log.params.logprobs))
                if delta is not None:
                    yield delta
            step += 1


def replace_choice(submission: Submission, choice: int) -> Any:
    """The prompt's log-probabilities are told apart from the tokens here."""
    return msgspec.structs.replace(submission.params, choice=choice, prompt_logprobs=None)


class FakeEngine:
    def __init__(self, tokenizer: Any, max_model_len: int = 256) -> None:
        self.tokenizer = tokenizer
        self.model = ModelInfo(
            "tiny", "/models/tiny", max_model_len, len(tokenizer), (tokenizer.eos_token_id,)
        )
        self.reset()

    def reset(self) -> None:
        self.script: Script = lambda prompt, choice: list(prompt)
        self.step_s = 0.0
        self.fail_at_step: int | None = None
        self.degraded_at_step: int | None = None
        self.degraded_from_start = False
        self.unavailable: EngineUnavailable | None = None
        self.hold_submit = False
        self.refuse_held: EngineUnavailable | None = None
        self.submit_cancelled = False
        self.broken = False
        self.state = "serving"
        self.submissions: list[Submission] = []
        self.streams: list[FakeStream] = []
        self.applied: list[Any] = []
        self.injected: list[Any] = []

    @property
    def state_name(self) -> str:
        return self.state

    @property
    def alive(self) -> bool:
        return self.state != "failed"

    @property
    def ready(self) -> bool:
        return self.state == "serving"

    async def submit(self, submission: Submission) -> FakeStream:
        if self.broken:
            raise KeyError("a bug of ours")
        if self.unavailable is not None:
            raise self.unavailable
        try:
            while self.hold_submit:
                await asyncio.sleep(0.01)
                if self.refuse_held is not None:
                    raise self.refuse_held
        except asyncio.CancelledError:
            self.submit_cancelled = True
            raise
        self.submissions.append(submission)
        self.streams.append(FakeStream(self, submission))
        return self.streams[-1]

    def status(self) -> dict[str, Any]:
        return {"schema_version": 1, "state": self.state, "epoch": 3}

    def metrics(self) -> bytes:
        return b"revivemoe_steps_total 3.0\n"

    async def apply(self, instruction: str, params: dict[str, Any], request_id: str) -> Any:
        if instruction == "whatif":
            return {"plan": params}
        if instruction != "pause":
            raise ValueError(f"unknown instruction {instruction!r}")
        self.applied.append((instruction, params, request_id))
        return None

    async def inject(self, fault: dict[str, Any]) -> str:
        if "id" not in fault:
            raise ValueError("`id` is required")
        self.injected.append(fault)
        return "injection-1"

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"event": "signal", "id": 2}
        yield {"event": "decision", "id": 2}
        await asyncio.sleep(3600)
