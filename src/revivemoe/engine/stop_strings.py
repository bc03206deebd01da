"""Stop strings: where a text ends, and what must be held back until that is known. Pure.

A stop string may name special tokens, which the text need not show: hidden ones, and the one that
ends the sequence. So a choice is followed in two forms: as it is *shown*, and *marked*, where each
such token is a lone surrogate, which no text can hold.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from revivemoe.streams import StopStrings

_FIRST_MARK = 0xD800
_MARKS = 0x7FF
_OTHER = "\udfff"
"""A special token that no stop string names."""


def is_mark(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"


def unmarked(text: str) -> str:
    """Without what stands for hidden tokens."""
    if text.isascii() or not any(map(is_mark, text)):
        return text
    return "".join(char for char in text if not is_mark(char))


@dataclass(frozen=True)
class Released:
    """Marked text that may leave the matcher, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None
    num_spelled: int = 0
    """So many of the last characters are a stop string whose hidden tokens are to be shown."""


class Stops:
    """The stop strings of a request, prepared once for all of its choices."""

    def __init__(
        self, stop: StopStrings, specials: Mapping[int, str] | None = None, hidden: bool = True
    ) -> None:
        """`specials`: text of each special token; `hidden`: they are not shown."""
        specials = specials or {}
        together = "\0".join(stop.strings)
        named = {t for t in specials.values() if t and t in together}
        longest_first = sorted(named, key=lambda text: (-len(text), text))[:_MARKS]
        self._mark_of_text = {text: chr(_FIRST_MARK + k) for k, text in enumerate(longest_first)}
        self._text_of_mark = {mark: text for text, mark in self._mark_of_text.items()}
        self._text_of_mark[_OTHER] = ""
        marked = specials if named else {}
        self.mark_of = {i: self._mark_of_text.get(t, _OTHER) for i, t in marked.items()}
        """By token id, if some stop string names a special token."""
        self.include = stop.include_in_output
        self.hidden = hidden
        self.shown = Needles({s: s for s in stop.strings})
        mark = self._all_marked if hidden else self._end_marked
        self.marked = Needles({mark(s): s for s in stop.strings if mark(s) != s})

    def spelled(self, text: str) -> str:
        """With the text of each hidden token."""
        return "".join(self._text_of_mark.get(char, char) for char in text)

    def _all_marked(self, string: str) -> str:
        for text, mark in self._mark_of_text.items():
            string = string.replace(text, mark)
        return string

    def _end_marked(self, string: str) -> str:
        """Where specials are shown, only the token that ends a sequence is not."""
        for text, mark in self._mark_of_text.items():
            if string.endswith(text):
                return string.removesuffix(text) + mark
        return string


class Needles:
    """Strings to be found, each with the stop string that it stands for: Aho's and Corasick's
    automaton, which takes one step for each character, however many strings there are.

    A state is the longest end of the text so far that some needle begins with; 0: none.
    """

    def __init__(self, told_as: Mapping[str, str]) -> None:
        self.told_as = told_as
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        """The longest shorter end that is a state."""
        self.depth = [0]
        """Characters of each state."""
        self._found: list[str | None] = [None]
        """The longest needle that ends there."""
        for needle in told_as:
            self._add(needle)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)

    def found(self, state: int) -> str | None:
        """The longest needle that ends there."""
        return self._found[state]

    def begun(self, state: int) -> int:
        """The longest end that is not a whole needle and nothing more."""
        while state and not self._next[state]:
            state = self._fallback[state]
        return state

    def _add(self, needle: str) -> None:
        state = 0
        for char in needle:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self._found.append(None)
            state = self._next[state][char]
        self._found[state] = needle

    def _link(self) -> None:
        """Fallbacks, from short to long: each stands on that of the state before."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, longer in self._next[state].items():
                fallback = self.step(self._fallback[state], char)
                self._fallback[longer] = fallback
                self._found[longer] = self._found[longer] or self._found[fallback]
                waiting.append(longer)


def _first_and_longest(match: tuple[int, int, str]) -> tuple[int, int, int]:
    end, start, stop = match
    return end, start, -len(stop)


class StopMatcher:
    """Finds the stop string that is completed first; holds back text one may begin in.

    The result does not depend on how the text is cut into pieces. When several stop strings are
    completed by the same character the longest counts.
    """

    def __init__(self, stops: Stops) -> None:
        self.stops = stops
        self._shown = _Tail(stops.shown)
        self._marked = _Tail(stops.marked)
        self._held = ""
        """Marked text that has not left."""
        self._end = 0
        """Marked characters so far."""

    @property
    def active(self) -> bool:
        """Whether there is any stop string."""
        return bool(self.stops.shown.told_as)

    def push(self, text: str, mark: str = "", armed: bool = True) -> Released:
        """Take what one token shows, and its mark. Only a match that ends in it counts, and only
        while `armed`.
        """
        if not self.active:
            return Released(text)
        begin, held = self._end - len(self._held), self._held + text + mark
        places = range(self._end, self._end + len(text) + len(mark))
        self._end = places.stop
        shown = self._shown.push(text, places[: len(text)])
        marked = self._marked.push(text + mark, places)
        found = [m for m in (shown, marked) if m is not None]
        if armed and (match := min(found, key=_first_and_longest, default=None)):
            end, start, stop = match
            if not self.stops.include:
                return Released(held[: start - begin], stop)
            num_spelled = 0 if match is shown else end - max(start, begin)
            return Released(held[: end - begin], stop, num_spelled)
        left = self._first_held() - begin
        self._held = held[left:]
        return Released(held[:left])

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        return self._held

    def _first_held(self) -> int:
        """Where what must wait begins."""
        if self.stops.include:  # of a string that will be shown, only hidden tokens are in doubt
            return self._marked.first_mark(self._end)
        return min(self._shown.begin(self._end), self._marked.begin(self._end))


class _Tail:
    """The end of one form of the text: the longest that some needle begins with."""

    def __init__(self, needles: Needles) -> None:
        self._needles = needles
        self._state = 0
        self._chars = ""
        self._places: list[int] = []
        """Of each character, in the marked text."""

    def push(self, text: str, places: Sequence[int]) -> tuple[int, int, str] | None:
        """Take more text; (end, start, stop string) of what it completes first, by places."""
        needles, state, match = self._needles, self._state, None
        if not needles.told_as:
            return None
        chars, where = self._chars + text, [*self._places, *places]
        for end, char in enumerate(text, start=len(self._chars) + 1):
            state = needles.step(state, char)
            if match is None and (needle := needles.found(state)) is not None:
                match = where[end - 1] + 1, where[end - len(needle)], needles.told_as[needle]
        self._state = needles.begun(state)
        kept = len(chars) - needles.depth[self._state]
        self._chars, self._places = chars[kept:], where[kept:]
        return match

    def begin(self, end: int) -> int:
        """Its place; `end` if it is empty."""
        return self._places[0] if self._places else end

    def first_mark(self, end: int) -> int:
        """Place of the first mark in it; `end` without one."""
        marks = (p for p, char in zip(self._places, self._chars, strict=True) if is_mark(char))
        return next(marks, end)
