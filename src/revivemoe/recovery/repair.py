"""Where experts without a live replica shall be loaded: into spare slots of the survivors.

A slot is spare if it is empty, or if its expert has another live replica.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from revivemoe.ids import ExpertId, LayerId, RankId, SlotId
from revivemoe.membership.placement import (
    EMPTY,
    ExpertPlacement,
)

Missing = list[tuple[LayerId, ExpertId]]


@dataclass(frozen=True)
class Reload:
    """One expert to be loaded into one slot."""

    rank: RankId
    layer: LayerId
    slot: SlotId
    expert: ExpertId


def assign_reloads(
    placement: ExpertPlacement, missing: Iterable[tuple[LayerId, ExpertId]]
) -> tuple[Reload, ...]:
    """A spare slot for as many of `missing` as there is room for, spread over the ranks.

    Empty slots go first, replicas after them; of equals the rank that loads least, so that the
    ranks load in parallel.
    """
    wanted: dict[LayerId, list[ExpertId]] = {}
    for layer, expert in missing:
        wanted.setdefault(layer, []).append(expert)
    loads: Counter[RankId] = Counter()
    reloads: list[Reload] = []
    for layer, experts in wanted.items():
        reloads += _assign_layer(placement, layer, experts, loads)
    return tuple(reloads)


def assign_replicas(placement: ExpertPlacement, home: ExpertPlacement) -> tuple[Reload, ...]:
    """Empty slots for experts that have fewer live replicas than in `home`, the rarest first."""
    reloads: list[Reload] = []
    for index, layer in enumerate(placement.layers):
        rows = {rank: list(table[index]) for rank, table in placement.slots.items()}
        wanted = Counter(e for table in home.slots.values() for e in table[index])
        live = Counter(e for row in rows.values() for e in row)
        fewer = [e for e in range(placement.num_experts) if 0 < live[e] < wanted[e]]
        for expert in sorted(fewer, key=lambda e: (live[e], e)):
            room = [r for r, row in sorted(rows.items()) if EMPTY in row and expert not in row]
            if room:
                rank = max(room, key=lambda r: rows[r].count(EMPTY))
                slot = rows[rank].index(EMPTY)
                rows[rank][slot] = expert
                reloads.append(Reload(rank, layer, SlotId(slot), ExpertId(expert)))
    return tuple(reloads)


def _assign_layer(
    placement: ExpertPlacement, layer: LayerId, experts: list[ExpertId], loads: Counter[RankId]
) -> list[Reload]:
    index = placement.layers.index(layer)
    rows = {rank: list(table[index]) for rank, table in placement.slots.items()}
    copies = Counter(e for row in rows.values() for e in row if e != EMPTY)
    taken: set[tuple[RankId, int]] = set()
    reloads = []
    for expert in experts:
        spare = _best_spare(rows, copies, loads, taken)
        if spare is None:
            break
        rank, slot = spare
        held = rows[rank][slot]
        if held != EMPTY:
            copies[held] -= 1
        rows[rank][slot] = expert
        taken.add(spare)
        loads[rank] += 1
        reloads.append(Reload(rank, layer, SlotId(slot), expert))
    return reloads


def _best_spare(
    rows: dict[RankId, list[int]],
    copies: Counter[int],
    loads: Counter[RankId],
    taken: set[tuple[RankId, int]],
) -> tuple[RankId, int] | None:
    spare = [
        (held != EMPTY, loads[rank], rank, slot)
        for rank, row in rows.items()
        for slot, held in enumerate(row)
        if (held == EMPTY or copies[held] > 1) and (rank, slot) not in taken
    ]
    if not spare:
        return None
    _, _, rank, slot = min(spare)
    return rank, slot


def with_reloads(placement: ExpertPlacement, reloads: Iterable[Reload]) -> ExpertPlacement:
    """The map once these are in their slots."""
    for load in reloads:
        placement = placement.with_slot(load.rank, load.layer, load.slot, load.expert)
    return placement


def with_cleared(placement: ExpertPlacement, reloads: Iterable[Reload]) -> ExpertPlacement:
    """The map while these are being loaded: nobody is sent to their slots."""
    for load in reloads:
        placement = placement.with_slot(load.rank, load.layer, load.slot, EMPTY)
    return placement
