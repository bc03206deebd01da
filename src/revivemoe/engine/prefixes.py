"""Which rank was lately given which beginnings of prompts: their KV may still be in its cache.

A guess, made from what this side knows. A wrong one costs a prefill, and nothing else.
"""

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from hashlib import blake2b

from revivemoe.ids import RankId

PIECE = 64
"""Tokens of a beginning that is known, or a multiple of it."""
MOST_PIECES = 64
"""Of a prompt that are looked at."""
MOST_NAMES = 4096
"""Beginnings remembered of each rank; the oldest are forgotten."""

Names = tuple[bytes, ...]


def names_of(prompt_ids: Sequence[int]) -> Names:
    """Of the beginnings of a prompt, of 64 tokens, 128, and so on."""
    names, before = [], b""
    for index in range(min(len(prompt_ids) // PIECE, MOST_PIECES)):
        piece = array("q", prompt_ids[index * PIECE : (index + 1) * PIECE])
        before = blake2b(before + piece.tobytes(), digest_size=16).digest()
        names.append(before)
    return tuple(names)


class Prefixes:
    """Of every rank."""

    def __init__(self) -> None:
        self._known: defaultdict[RankId, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def tokens(self, rank: RankId, names: Names) -> int:
        """So many of a prompt's first tokens may be there."""
        known = self._known[rank]
        count = next((i for i, name in enumerate(names) if name not in known), len(names))
        return count * PIECE

    def note(self, rank: RankId, names: Names) -> None:
        """A sequence that begins so has been given to it."""
        known = self._known[rank]
        for name in names:
            known[name] = None
            known.move_to_end(name)
        while len(known) > MOST_NAMES:
            known.popitem(last=False)

    def forget(self, rank: RankId) -> None:
        """Its process is gone, and its cache with it."""
        self._known.pop(rank, None)
