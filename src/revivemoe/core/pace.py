"""How many prompt tokens a step may take beside decodes, by what both have cost so far."""

from dataclasses import dataclass

FIRST = 64
"""Prompt tokens, until anything is known."""
LEAST = 16
"""So that a prefill always gets on."""
MANY = 64
"""Prompt tokens from which on a step without decodes tells what one costs."""
ASK_AGAIN = 32
"""Steps with prefill, after which one without shows what decodes cost by now."""
WEIGHT = 0.2
"""Of the newest step in what is remembered."""
USUAL, GENTLE = 8.0, 2.0
"""Times the duration of a step of decodes that one with prefill may take: as a rule, as in engines
that take whole prompts beside decodes; and while what a failure has moved is computed again, which
nobody has asked for."""


@dataclass
class Pace:
    """Learns from the steps of one rank. Seconds are of its own work, without waits for peers."""

    _decodes_s: float | None = None
    """Of a step that only decodes."""
    _token_s: float | None = None
    """Of one prompt token more."""
    _mixed: int = 0
    """Steps with prefill beside decodes, one after another."""

    def note_shared(self) -> None:
        """A step in which peers had a prefill: part of it was worked on here, so it tells nothing.
        Nor is it waited for any longer that one does: two ranks would wait for each other.
        """
        self._mixed = 0

    def note(self, num_prefill: int, num_decodes: int, seconds: float) -> None:
        """A step has taken so long: for so many prompt tokens, and so many sequences' next one; no
        peer had a prefill in it.
        """
        self._mixed = self._mixed + 1 if num_prefill > 1 and num_decodes else 0
        if num_prefill <= 1:
            self._decodes_s = _blend(self._decodes_s, seconds) if num_decodes else self._decodes_s
        elif num_decodes and num_prefill >= LEAST:
            if self._decodes_s is not None:
                extra = max(seconds - self._decodes_s, 0.0)
                self._token_s = _blend(self._token_s, extra / num_prefill)
        elif num_prefill >= MANY:
            self._token_s = _blend(self._token_s, seconds / num_prefill)

    def prefill_tokens(self, stretch: float, most: int) -> int:
        """So many that a step takes at most `stretch` times as long as one that only decodes."""
        if self._mixed >= ASK_AGAIN:
            return 1  # what decodes cost by now is not known otherwise
        if self._decodes_s is None or self._token_s is None:
            return min(FIRST, most)
        spare = (stretch - 1) * self._decodes_s
        affordable = spare / self._token_s if self._token_s > 0 else most
        return min(max(int(min(affordable, most)), LEAST), most)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
