"""Which expert lies in which slot of which rank. A pure value; the only place that decides it.

Legend for shapes: L MoE layers, S slots per rank and layer, E experts per layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from revivemoe.ids import ExpertId, LayerId, RankId, SlotId

EMPTY = -1
Table = tuple[tuple[int, ...], ...]
"""Slots of one rank, [L][S]: the expert in each, or EMPTY."""
Holder = tuple[RankId, SlotId]
ExpertOfLayer = tuple[LayerId, ExpertId]


@dataclass(frozen=True)
class Reload:
    """One expert to be loaded into one slot."""

    rank: RankId
    layer: LayerId
    slot: SlotId
    expert: ExpertId


class ExpertPlacement(msgspec.Struct, frozen=True, dict=True):
    """Experts in slots: `slots[rank][i][s]` is what slot s of layer `layers[i]` holds, or -1.

    What follows from that is worked out once, when it is first asked for.
    """

    num_experts: int
    layers: tuple[LayerId, ...]
    """The model's MoE layers (decoder layer numbers), ascending."""
    slots: dict[RankId, Table]

    # ---- what follows ------------------------------------------------------------------------

    @cached_property
    def slots_per_rank(self) -> int:
        return max((len(table[0]) for table in self.slots.values() if table), default=0)

    @cached_property
    def index_of(self) -> dict[LayerId, int]:
        """Position of each layer in `layers`."""
        return {layer: i for i, layer in enumerate(self.layers)}

    @cached_property
    def holders_LE(self) -> list[list[list[Holder]]]:
        """Every (rank, slot) that holds an expert, by rank: [L][E][replicas]."""
        holders: list[list[list[Holder]]] = [
            [[] for _ in range(self.num_experts)] for _ in self.layers
        ]
        for rank, table in sorted(self.slots.items()):
            for of_layer, row in zip(holders, table, strict=True):
                for slot, expert in enumerate(row):
                    if expert != EMPTY:
                        of_layer[expert].append((rank, SlotId(slot)))
        return holders

    def holders(self, layer: LayerId, expert: ExpertId) -> list[Holder]:
        """Every (rank, slot) that holds this expert, by rank."""
        return self.holders_LE[self.index_of[layer]][expert]

    @cached_property
    def missing(self) -> tuple[ExpertOfLayer, ...]:
        """Experts that no rank holds, sorted by (layer, expert)."""
        return tuple(
            (layer, ExpertId(expert))
            for layer, of_layer in zip(self.layers, self.holders_LE, strict=True)
            for expert, held in enumerate(of_layer)
            if not held
        )

    @cached_property
    def missing_fraction(self) -> float:
        """Largest share of one layer's experts that no rank holds."""
        worst = max((sum(not held for held in row) for row in self.holders_LE), default=0)
        return worst / self.num_experts

    @cached_property
    def sole_holders(self) -> dict[RankId, set[ExpertOfLayer]]:
        """For each rank, the experts that would be gone if it died now."""
        sole: dict[RankId, set[ExpertOfLayer]] = {rank: set() for rank in self.slots}
        for layer, of_layer in zip(self.layers, self.holders_LE, strict=True):
            for expert, held in enumerate(of_layer):
                if held and held[0][0] == held[-1][0]:
                    sole[held[0][0]].add((layer, ExpertId(expert)))
        return sole

    # ---- other maps --------------------------------------------------------------------------

    def without(self, lost: frozenset[RankId]) -> "ExpertPlacement":
        """The map with the slots of `lost` ranks dropped."""
        kept = {rank: table for rank, table in self.slots.items() if rank not in lost}
        return msgspec.structs.replace(self, slots=kept) if len(kept) < len(self.slots) else self

    def with_ranks(self, tables: Mapping[RankId, Table]) -> "ExpertPlacement":
        """The map with these ranks' slots added, or replaced."""
        return msgspec.structs.replace(self, slots={**self.slots, **tables}) if tables else self

    def with_reloads(self, reloads: Iterable[Reload]) -> "ExpertPlacement":
        """The map once these are in their slots."""
        return self._with_held((r, int(r.expert)) for r in reloads)

    def cleared(self, slots: Iterable[Reload]) -> "ExpertPlacement":
        """The map while these slots are being loaded: nobody is sent there."""
        return self._with_held((r, EMPTY) for r in slots)

    def _with_held(self, changes: Iterable[tuple[Reload, int]]) -> "ExpertPlacement":
        rows: dict[RankId, list[list[int]]] = {}
        for slot, expert in changes:
            if slot.rank not in rows:
                rows[slot.rank] = [list(row) for row in self.slots[slot.rank]]
            rows[slot.rank][self.index_of[slot.layer]][slot.slot] = expert
        if not rows:
            return self
        tables = {rank: tuple(map(tuple, table)) for rank, table in rows.items()}
        return msgspec.structs.replace(self, slots={**self.slots, **tables})


def place(
    num_experts: int,
    layers: Sequence[int],
    ranks: Sequence[RankId],
    redundant: int = 0,
    spare: int = 0,
) -> ExpertPlacement:
    """Place experts and `redundant` extra replicas per layer; leave `spare` slots empty per rank.

    Coverage first: no two replicas of an expert share a rank, and the budget covers whole ranks one
    after another, which maximises the number of single-rank losses that leave no expert missing.
    Then balance: each replica goes to the least filled rank that may take it.

    Raises ValueError if there are more ranks than experts or more replicas than ranks to hold them.
    """
    num_ranks = len(ranks)
    if num_ranks > num_experts:
        raise ValueError(
            f"{num_ranks} expert-holding ranks but only {num_experts} experts per layer: "
            "start with fewer ranks (--data-parallel-size / --expert-ranks)"
        )
    if redundant > num_experts * (num_ranks - 1):
        raise ValueError(
            f"--redundant-experts {redundant} is more than {num_experts} experts on "
            f"{num_ranks} ranks can use ({num_experts * (num_ranks - 1)})"
        )
    row = _place_layer(num_experts, num_ranks, redundant)
    width = max(len(held) for held in row) + spare
    slots = {
        rank: (tuple(held) + (EMPTY,) * (width - len(held)),) * len(layers)
        for rank, held in zip(ranks, row, strict=True)
    }
    return ExpertPlacement(
        num_experts=num_experts, layers=tuple(LayerId(layer) for layer in layers), slots=slots
    )


def _place_layer(num_experts: int, num_ranks: int, redundant: int) -> list[list[int]]:
    """Experts held by each rank (by position) in one layer."""
    bounds = [r * num_experts // num_ranks for r in range(num_ranks + 1)]
    held = [list(range(bounds[r], bounds[r + 1])) for r in range(num_ranks)]
    cheapest_first = sorted(range(num_ranks), key=lambda r: bounds[r + 1] - bounds[r])
    owner_order = [e for r in cheapest_first for e in range(bounds[r], bounds[r + 1])]
    for i in range(redundant):
        expert = owner_order[i % num_experts]
        free = [r for r in range(num_ranks) if expert not in held[r]]
        held[min(free, key=lambda r: (len(held[r]), r))].append(expert)
    base = [bounds[r + 1] - bounds[r] for r in range(num_ranks)]
    while _level(held, base):
        pass
    return held


def _level(held: list[list[int]], base: list[int]) -> bool:
    """Move one replica from a full rank to an emptier one that may take it, if that levels."""
    by_load = sorted(range(len(held)), key=lambda r: (len(held[r]), r))
    for full in reversed(by_load):
        for empty in by_load:
            if len(held[full]) - len(held[empty]) < 2:
                break
            for expert in held[full][base[full] :]:
                if expert not in held[empty]:
                    held[full].remove(expert)
                    held[empty].append(expert)
                    return True
    return False
