"""The token log: the engine's record of one sequence, from which any rank can continue it.

It is what makes request traffic idempotent: a token is appended if and only if its position equals
the length of the log and the log is open. Pure: no I/O, no clock.
"""

from collections.abc import Sequence

from revivemoe.detokenizer import Detokenizer
from revivemoe.engine.shown import Shown, Token
from revivemoe.engine.stop_strings import Released, StopMatcher, Stops
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import FinishReason, SamplingParams, finish_reason
from revivemoe.streams import Delta, Piece


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
        stops: Stops,
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
        self._text = ""
        """What the last token has released."""
        self._stops = stops
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._shown = Shown(stops, detokenizer.open_bytes)
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
        if self.params.logprobs is None:
            logprobs = None
        elif logprobs is not None:
            self.logprobs.append(logprobs)
        return self._delta(self._end_or_go_on(token_id, logprobs))

    def _delta(self, tokens: list[Token]) -> Delta:
        """`tokens` are settled now; the text may be ahead of them by a part of one."""
        return Delta(
            index=self.index,
            token_ids=tuple(token.token_id for token in tokens),
            text=self._text,
            pieces=tuple(token.piece for token in tokens),
            logprobs=tuple(t.logprobs for t in tokens if t.logprobs is not None),
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

    def _end_or_go_on(self, token_id: int, logprobs: TokenLogprobs | None) -> list[Token]:
        """Decide whether the sequence is over, and what may be sent now."""
        reason = finish_reason(
            self.params, len(self.prompt_ids), self.output_ids, self._max_model_len
        )
        token = self._token(token_id, logprobs, reason)
        self._shown.push(token)
        released = self._release(token, reason)
        if released.stop is not None:
            self._finish("stop", released.stop)
        elif reason is not None:
            stopped_by_id = reason == "stop" and token_id not in self.params.eos_token_ids
            self._finish(reason, token_id if stopped_by_id else None)
        self._text = self._shown.text(released)
        logged = self.params.logprobs is not None
        if self.finish_reason is None and self._matcher.active and logged:
            return self._shown.release(released)
        return self._shown.release_all(released)

    def _token(
        self, token_id: int, logprobs: TokenLogprobs | None, reason: FinishReason | None
    ) -> Token:
        """What a token adds to the text."""
        # A token that ends the sequence is not part of its text, unless stop strings are included.
        ends = reason == "stop" and not self._stops.include
        piece = Piece("", b"") if ends else self._detokenizer.push(token_id)
        mark = self._stops.mark_of.get(token_id, "") if ends or self._stops.hidden else ""
        # What may be spelled out ends a character, as any token that is shown.
        last = reason is not None or (mark and self._stops.include)
        rest = self._detokenizer.flush() if last else ""
        return Token(token_id, logprobs, Piece(piece.text + rest, piece.raw), mark)

    def _release(self, token: Token, reason: FinishReason | None) -> Released:
        armed = len(self.output_ids) > self.params.min_tokens
        released = self._matcher.push(token.piece.text, token.mark, armed)
        if reason is None or released.stop is not None:
            return released
        return Released(released.text + self._matcher.flush())

    def _finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.sealed = True
