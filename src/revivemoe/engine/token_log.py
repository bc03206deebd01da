"""The token log: the engine's record of one sequence, from which any rank can continue it.

It is what makes request traffic idempotent: a token is appended if and only if its position equals
the length of the log and the log is open. Pure: no I/O, no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from revivemoe.detokenizer import Detokenizer
from revivemoe.messages.reports import TokenLogprobs
from revivemoe.sampling_params import FinishReason, SamplingParams, finish_reason
from revivemoe.streams import Delta, StopStrings


class TokenGap(Exception):
    """Entries are missing between the log and what arrived: fetch `expected` to `got - 1`."""

    def __init__(self, what: str, expected: int, got: int) -> None:
        super().__init__(f"{what}: expected position {expected}, got {got}")
        self.expected = expected
        self.got = got


@dataclass(frozen=True)
class Released:
    """Text that may leave the matcher, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Finds the stop string that is completed first; holds back text one may begin in.

    The result does not depend on how the text is cut into pieces. When several stop strings are
    completed by the same character the longest counts.
    """

    def __init__(self, stop: StopStrings) -> None:
        self._strings = stop.strings
        self._include = stop.include_in_output
        self._max_tail = max((len(s) for s in stop.strings), default=1) - 1
        self._first_chars = frozenset(s[0] for s in stop.strings)
        self._tail = ""
        """Longest end of the text so far that some stop string begins with."""

    def push(self, text: str, armed: bool = True) -> Released:
        """Take more text. Only a match that ends in it counts, and only while `armed`."""
        if not self._strings:
            return Released(text)
        seen = self._tail + text
        unreleased = len(self._tail) if self._include else 0
        match = self._match(seen, len(self._tail)) if armed else None
        if match is not None:
            start, stop = match
            end = start + len(stop) if self._include else start
            return Released(seen[unreleased:end], stop)
        self._tail = self._longest_beginning(seen)
        end = len(seen) if self._include else len(seen) - len(self._tail)
        return Released(seen[unreleased:end])

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        return "" if self._include else self._tail

    def _match(self, seen: str, old: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first beyond the first `old` characters."""
        found = []
        for stop in self._strings:
            start = seen.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _longest_beginning(self, seen: str) -> str:
        for start in range(max(0, len(seen) - self._max_tail), len(seen)):
            if seen[start] in self._first_chars:
                tail = seen[start:]
                if any(len(s) > len(tail) and s.startswith(tail) for s in self._strings):
                    return tail
        return ""


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

        Raises TokenGap when tokens before it are missing; the log is unchanged then.
        """
        if self.sealed or position < len(self.output_ids):
            return None
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
