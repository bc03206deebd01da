"""Which rank is given which sequence that has none. Pure, but for the suspects' turns."""

from collections.abc import Iterable

from revivemoe.engine.requests import LiveSequence
from revivemoe.engine.suspects import Suspects
from revivemoe.ids import RankId


def assignments(
    sequences: Iterable[LiveSequence], ranks: Iterable[RankId], suspects: Suspects
) -> list[tuple[LiveSequence, RankId]]:
    """Every sequence without a rank, with the one that has the fewest tokens, oldest first.

    Of suspects, each rank is given one request at a time.
    """
    load, unproven = dict.fromkeys(ranks, 0), set[RankId]()
    waiting = []
    for sequence in sequences:
        if sequence.owner is None:
            waiting.append(sequence)
            continue
        rank = sequence.owner[0]
        if not sequence.proven:
            unproven.add(rank)
        if rank in load:
            load[rank] += sequence.num_tokens
    found = []
    for sequence in sorted(waiting, key=lambda s: s.age):
        target = suspects.target(sequence.request, load, unproven)
        if target is not None:
            load[target] += sequence.num_tokens
            unproven.add(target)
            found.append((sequence, target))
    return found
