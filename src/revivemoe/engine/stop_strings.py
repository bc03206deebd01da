"""Stop strings: where a text ends, and what must be held back until that is known. Pure."""

from dataclasses import dataclass

from revivemoe.streams import StopStrings


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
