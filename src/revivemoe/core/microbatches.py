"""A step's sequences cut into micro-batches: as many on every member, empty ones included."""

from collections.abc import Sequence

from revivemoe.core.step import ScheduledSequence


def split(items: Sequence[ScheduledSequence], count: int) -> list[tuple[ScheduledSequence, ...]]:
    """`count` pieces of `items`, in their order, with about as many tokens each.

    A sequence is not cut: its tokens of one step belong together.
    """
    total = sum(item.count for item in items)
    pieces: list[list[ScheduledSequence]] = [[] for _ in range(count)]
    before = 0
    for item in items:
        middle = before + item.count / 2
        pieces[min(count - 1, int(middle * count / total))].append(item)
        before += item.count
    return [tuple(piece) for piece in pieces]
