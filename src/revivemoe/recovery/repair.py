"""Where experts without a live replica shall be loaded: into spare slots of the survivors.

A slot is spare if it is empty, or if its expert has another live replica.
"""

from collections import Counter
from collections.abc import Iterable, Set

from revivemoe.ids import ExpertId, LayerId, RankId, SlotId
from revivemoe.membership.placement import EMPTY, ExpertOfLayer, ExpertPlacement, Reload

SlotOfRank = tuple[RankId, LayerId, SlotId]


def assign_reloads(
    placement: ExpertPlacement,
    missing: Iterable[ExpertOfLayer],
    reserved: Set[SlotOfRank] = frozenset(),
    refusing: Set[RankId] = frozenset(),
) -> tuple[Reload, ...]:
    """A spare slot for as many of `missing` as there is room for, spread over the ranks.

    Empty slots go first, replicas after them; of equals the rank that loads least, so that the
    ranks load in parallel. `reserved`: slots that are being loaded into already. `refusing`: ranks
    that are not to load.
    """
    wanted: dict[LayerId, list[ExpertId]] = {}
    for layer, expert in missing:
        wanted.setdefault(layer, []).append(expert)
    loads: Counter[RankId] = Counter()
    reloads: list[Reload] = []
    for layer, experts in wanted.items():
        reloads += _assign_layer(placement, layer, experts, loads, reserved, refusing)
    assert len({(x.rank, x.layer, x.slot) for x in reloads} - reserved) == len(reloads)
    return tuple(reloads)


def assign_replicas(
    placement: ExpertPlacement, home: ExpertPlacement, refusing: Set[RankId] = frozenset()
) -> tuple[Reload, ...]:
    """Empty slots for experts that have fewer live replicas than in `home`, the rarest first."""
    reloads: list[Reload] = []
    for index, layer in enumerate(placement.layers):
        wanted, live = home.holders_LE[index], placement.holders_LE[index]
        fewer = [e for e, held in enumerate(live) if 0 < len(held) < len(wanted[e])]
        if not fewer:
            continue
        tables = sorted(placement.slots.items())
        rows = {rank: list(table[index]) for rank, table in tables if rank not in refusing}
        for expert in sorted(fewer, key=lambda e: (len(live[e]), e)):
            room = [r for r, row in rows.items() if EMPTY in row and expert not in row]
            if room:
                rank = max(room, key=lambda r: rows[r].count(EMPTY))
                slot = rows[rank].index(EMPTY)
                rows[rank][slot] = expert
                reloads.append(Reload(rank, layer, SlotId(slot), ExpertId(expert)))
    return tuple(reloads)


def _assign_layer(
    placement: ExpertPlacement,
    layer: LayerId,
    experts: list[ExpertId],
    loads: Counter[RankId],
    reserved: Set[SlotOfRank],
    refusing: Set[RankId],
) -> list[Reload]:
    index = placement.index_of[layer]
    copies = [len(held) for held in placement.holders_LE[index]]
    held_in: dict[tuple[RankId, SlotId], int] = {}
    """What lies in the slots that may be spare."""
    for rank, table in placement.slots.items():
        for slot, expert in enumerate(table[index]):
            if (rank, layer, slot) in reserved:
                copies[expert] -= expert != EMPTY
            elif rank in refusing:
                continue
            elif expert == EMPTY or copies[expert] > 1:
                held_in[rank, SlotId(slot)] = expert
    reloads = []
    for wanted in experts:
        spare = [
            (held != EMPTY, loads[rank], rank, slot)
            for (rank, slot), held in held_in.items()
            if held == EMPTY or copies[held] > 1
        ]
        if not spare:
            break
        _, _, rank, slot = min(spare)
        held = held_in.pop((rank, slot))
        if held != EMPTY:
            copies[held] -= 1
        copies[wanted] += 1
        loads[rank] += 1
        reloads.append(Reload(rank, layer, slot, wanted))
    return reloads
