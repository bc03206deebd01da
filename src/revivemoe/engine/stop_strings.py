"""Stop strings: where a text ends, and what must be held back until that is known. Pure.

A special token that is not shown is no part of the text, and may be part of a stop string. It goes
through the matcher as a mark: a lone surrogate, which no text can hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from revivemoe.streams import StopStrings

_FIRST_MARK = 0xD800
_MARKS = 0x800


@dataclass(frozen=True)
class Released:
    """Text that may leave the matcher, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class Marks:
    """Stands for the hidden special tokens that some stop string names."""

    def __init__(self, strings: Sequence[str], hidden: Mapping[int, str]) -> None:
        """`hidden`: text of each special token that is not shown."""
        named = {text for text in hidden.values() if text and any(text in s for s in strings)}
        longest_first = sorted(named, key=lambda text: (-len(text), text))[:_MARKS]
        self._mark_of = {text: chr(_FIRST_MARK + k) for k, text in enumerate(longest_first)}
        self._hidden = hidden if named else {}

    def of(self, token_id: int) -> str:
        """What a token puts into the matcher beside its text; mostly nothing."""
        return self._mark_of.get(self._hidden.get(token_id, ""), "")

    def marked(self, string: str) -> str:
        """A stop string as it reads where its special tokens are hidden."""
        for text, mark in self._mark_of.items():
            string = string.replace(text, mark)
        return string


def unmarked(text: str) -> str:
    """Without what stands for hidden tokens."""
    if text.isascii() or not any(0xD800 <= ord(char) < 0xE000 for char in text):
        return text
    return "".join(char for char in text if not 0xD800 <= ord(char) < 0xE000)


class StopMatcher:
    """Finds the stop string that is completed first; holds back text one may begin in.

    The result does not depend on how the text is cut into pieces. When several stop strings are
    completed by the same character the longest counts.
    """

    def __init__(self, stop: StopStrings, hidden: Mapping[int, str] | None = None) -> None:
        """`hidden`: text of each special token that is not shown."""
        self.marks = Marks(stop.strings, hidden or {})
        self._told_as = {self.marks.marked(s): s for s in stop.strings}
        self._told_as |= {s: s for s in stop.strings}
        self._strings = tuple(self._told_as)
        self._include = stop.include_in_output
        self._max_tail = max((len(s) for s in self._strings), default=1) - 1
        self._first_chars = frozenset(s[0] for s in self._strings)
        self._tail = ""
        """Longest end of the text so far that some stop string begins with."""

    @property
    def active(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._strings)

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
            return Released(seen[unreleased:end], self._told_as[stop])
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
