"""Which expert lies in which slot of which rank. A pure value; the only place that decides it.

Legend for shapes: L MoE layers, S slots per rank and layer, E experts per layer.
"""

from collections.abc import Sequence

import msgspec

from revivemoe.ids import ExpertId, LayerId, RankId, SlotId

EMPTY = -1


class ExpertPlacement(msgspec.Struct, frozen=True):
    """Experts in slots: `slots[rank][i][s]` is what slot s of layer `layers[i]` holds, or -1."""

    num_experts: int
    layers: tuple[LayerId, ...]
    """The model's MoE layers (decoder layer numbers), ascending."""
    slots: dict[RankId, tuple[tuple[int, ...], ...]]

    @property
    def slots_per_rank(self) -> int:
        return max((len(table[0]) for table in self.slots.values() if table), default=0)

    def holders(self, layer_index: int, expert: ExpertId) -> list[tuple[RankId, SlotId]]:
        """Every (rank, slot) that holds `expert` in the layer at `layer_index`, by rank."""
        return [
            (rank, SlotId(table[layer_index].index(expert)))
            for rank, table in sorted(self.slots.items())
            if expert in table[layer_index]
        ]

    def missing(self) -> list[tuple[LayerId, ExpertId]]:
        """Experts that no rank holds, sorted by (layer, expert)."""
        return [
            (layer, ExpertId(e))
            for i, layer in enumerate(self.layers)
            for e in range(self.num_experts)
            if all(e not in table[i] for table in self.slots.values())
        ]

    def without(self, lost: frozenset[RankId]) -> "ExpertPlacement":
        """The map with the slots of `lost` ranks dropped."""
        kept = {rank: table for rank, table in self.slots.items() if rank not in lost}
        return ExpertPlacement(num_experts=self.num_experts, layers=self.layers, slots=kept)

    def with_rank(self, rank: RankId, table: tuple[tuple[int, ...], ...]) -> "ExpertPlacement":
        """The map with a rank's slots added, or replaced."""
        return msgspec.structs.replace(self, slots={**self.slots, rank: table})

    def with_slot(self, rank: RankId, layer: LayerId, slot: SlotId, held: int) -> "ExpertPlacement":
        """The map with one slot holding another expert, or EMPTY."""
        index = self.layers.index(layer)
        row = self.slots[rank][index]
        row = (*row[:slot], held, *row[slot + 1 :])
        table = self.slots[rank]
        return self.with_rank(rank, (*table[:index], row, *table[index + 1 :]))

    def sole_holders(self) -> dict[RankId, set[tuple[LayerId, ExpertId]]]:
        """For each rank, the experts that would be gone if it died now."""
        sole: dict[RankId, set[tuple[LayerId, ExpertId]]] = {rank: set() for rank in self.slots}
        for i, layer in enumerate(self.layers):
            for e in range(self.num_experts):
                held_by = self.holders(i, ExpertId(e))
                if len(held_by) == 1:
                    sole[held_by[0][0]].add((layer, ExpertId(e)))
        return sole


def missing_fraction(placement: ExpertPlacement) -> float:
    """Largest share of one layer's experts that no rank holds."""
    counts: dict[int, int] = {}
    for layer, _ in placement.missing():
        counts[layer] = counts.get(layer, 0) + 1
    return max(counts.values(), default=0) / placement.num_experts


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
