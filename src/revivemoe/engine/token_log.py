"""The token log: the engine's record of one sequence, from which any rank can continue it.

It is what makes request traffic idempotent: a token is appended if and only if its position equals
the length of the log and the log is open. Pure: no I/O, no clock.
"""

from collections.abc import Sequence

from revivemoe.detokenizer import Detokenizer
from revivemoe.engine.stop_strings import Released, StopMatcher
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import FinishReason, SamplingParams, finish_reason
from revivemoe.streams import Delta, StopStrings


class TokenGap(Exception):
    """Entries are missing between the log and what arrived: fetch `expected` to `got - 1`."""

    def __init__(self, what: str, expected: int, got: int) -> None:
        super().__init__(f"{what}: expected position {expected}, got {got}")
        self.expected = expected
        self.got = got


class TokenLog:
    """One sequence: prompt, committed output, text held back, how it ended."""

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop: StopStrings,
        detokenizer: Detokenizer,
        max_model_len: int,
        degraded: bool = False,
    ) -> None:
        self.index = index
        """`Delta.index`: prompt index * n + choice."""
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        """One per output token when asked for."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of prompt positions 1 onwards."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.degraded = degraded
        self.sealed = False
        """Whatever arrives is dropped: finished, aborted or failed."""
        self._include_stop = stop.include_in_output
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop)
        self._max_model_len = max_model_len

    def append(
        self, position: int, token_id: int, logprobs: TokenLogprobs | None = None
    ) -> Delta | None:
        """Append a committed token; None when it is a duplicate or the log is sealed.

        Raises TokenGap when tokens before it are missing, or prompt log-probabilities, all of which
        come before the first token; the log is unchanged then.
        """
        if self.sealed or position < len(self.output_ids):
            return None
        if self.params.prompt_logprobs is not None and not self._is_scored:
            raise TokenGap("prompt log-probability", self.num_prompt_logprobs + 1, position)
        if position > len(self.output_ids):
            raise TokenGap("output token", len(self.output_ids), position)
        assert logprobs is not None or self.params.logprobs is None, "log-probabilities missing"
        self.output_ids.append(token_id)
        kept_logprobs = self._keep(logprobs)
        text = self._end_or_go_on(token_id)
        return Delta(
            index=self.index,
            token_ids=(token_id,),
            text=text,
            logprobs=kept_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            degraded=self.degraded,
        )

    def append_prompt_logprobs(
        self, start: int, entries: Sequence[TokenLogprobs]
    ) -> tuple[TokenLogprobs, ...] | None:
        """Add those of prompt positions `start` onwards. Returns all of them when complete, once.

        What is there already is skipped. Raises TokenGap.
        """
        expected = self.num_prompt_logprobs + 1
        if self.sealed or start + len(entries) <= expected:
            return None
        if start > expected:
            raise TokenGap("prompt log-probability", expected, start)
        self.prompt_logprobs.extend(entries[expected - start :])
        assert self.num_prompt_logprobs < len(self.prompt_ids), "more entries than prompt tokens"
        if self.num_prompt_logprobs < len(self.prompt_ids) - 1:
            return None
        return tuple(self.prompt_logprobs)

    @property
    def _is_scored(self) -> bool:
        """Whether the log-probabilities of the whole prompt are there."""
        return self.num_prompt_logprobs >= len(self.prompt_ids) - 1

    @property
    def num_prompt_logprobs(self) -> int:
        return len(self.prompt_logprobs)

    def mark_degraded(self) -> None:
        """Experts are missing from now on; every later `Delta` says so."""
        if not self.sealed:
            self.degraded = True

    def seal(self) -> None:
        """Take nothing more: the request was aborted or failed."""
        self.sealed = True

    def _keep(self, logprobs: TokenLogprobs | None) -> tuple[TokenLogprobs, ...]:
        if logprobs is None or self.params.logprobs is None:
            return ()
        self.logprobs.append(logprobs)
        return (logprobs,)

    def _end_or_go_on(self, token_id: int) -> str:
        """Decide whether the sequence is over, and return the text that may be sent now."""
        reason = finish_reason(
            self.params, len(self.prompt_ids), self.output_ids, self._max_model_len
        )
        released = self._release(token_id, reason)
        if released.stop is not None:
            self._finish("stop", released.stop)
        elif reason is not None:
            stopped_by_id = reason == "stop" and token_id not in self.params.eos_token_ids
            self._finish(reason, token_id if stopped_by_id else None)
        return released.text

    def _release(self, token_id: int, reason: FinishReason | None) -> Released:
        # A token that ends the sequence is not part of its text, unless stop strings are included.
        hidden = reason == "stop" and not self._include_stop
        text = "" if hidden else self._detokenizer.push(token_id)
        if reason is not None:
            text += self._detokenizer.flush()
        armed = len(self.output_ids) > self.params.min_tokens
        released = self._matcher.push(text, armed)
        if reason is None or released.stop is not None:
            return released
        return Released(released.text + self._matcher.flush())

    def _finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.sealed = True
