"""Which rank is given which sequence that has none. Pure, but for the suspects' turns, and what is
remembered of prefixes.
"""

from collections import defaultdict
from collections.abc import Iterable

from revivemoe.engine.prefixes import Prefixes, names_of
from revivemoe.engine.requests import LiveSequence
from revivemoe.engine.suspects import Suspects
from revivemoe.ids import RankId, SeqId


def assignments(
    sequences: Iterable[LiveSequence],
    ranks: Iterable[RankId],
    suspects: Suspects,
    prefixes: Prefixes,
) -> list[tuple[LiveSequence, RankId]]:
    """Every sequence without a rank, oldest first, with the one that has the fewest tokens: those
    of the sequence that its cache may save count as so many fewer.

    Of suspects, each rank is given one request at a time.
    """
    load, unproven = dict.fromkeys(ranks, 0), set[RankId]()
    pending: defaultdict[int, set[SeqId]] = defaultdict(set)
    waiting = []
    for sequence in sequences:
        if sequence.owner is None or not sequence.proven:
            pending[sequence.request.arrival].add(sequence.seq_id)
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
        request, names = sequence.request, names_of(sequence.log.prompt_ids)
        felt = {rank: tokens - prefixes.tokens(rank, names) for rank, tokens in load.items()}
        target = suspects.target(request, felt, unproven, pending[request.arrival])
        if target is not None:
            load[target] += sequence.num_tokens
            prefixes.note(target, names)
            unproven.add(target)
            found.append((sequence, target))
    return found
