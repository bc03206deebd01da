"""Which attention ranks shall become expert ranks, and which experts they load.

Paper section 3: a rank of the attention side hands its sequences over, drops what it does not need
any more, takes the failed expert rank's place, and loads the lost experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from revivemoe.ids import ExpertId, LayerId, RankId, SlotId
from revivemoe.membership.placement import EMPTY, ExpertOfLayer, ExpertPlacement, Reload, Table
from revivemoe.membership.topology import Topology, donors, switched
from revivemoe.recovery.repair import assign_replicas


@dataclass(frozen=True)
class RoleSwitch:
    """One attention rank becomes an expert rank."""

    rank: RankId
    replaces: RankId | None
    """The failed expert rank whose place it takes; None: it comes last."""
    table: Table
    """What its slots shall hold."""

    def __post_init__(self) -> None:
        assert self.rank != self.replaces, "a rank in its own place"
        assert len({len(row) for row in self.table}) <= 1, "slots are the same in all layers"

    def loads(self, layers: Sequence[LayerId]) -> tuple[Reload, ...]:
        """Each expert it has to load."""
        return tuple(
            Reload(self.rank, layer, SlotId(slot), ExpertId(expert))
            for layer, row in zip(layers, self.table, strict=True)
            for slot, expert in enumerate(row)
            if expert != EMPTY
        )


def choose_switches(
    topology: Topology,
    placement: ExpertPlacement,
    wanted: Iterable[ExpertOfLayer],
    num_slots: int,
    tokens: Mapping[RankId, int],
    places: Sequence[RankId],
) -> tuple[RoleSwitch, ...] | str:
    """As few switches as hold all of `wanted`, of the ranks that cost least; or why it cannot be.

    `num_slots`: of an expert rank, in every layer. `tokens`: what would have to be computed again
    for each rank. `places`: of failed expert ranks, to be taken in this order.
    """
    left: dict[LayerId, list[int]] = {layer: [] for layer in placement.layers}
    for layer, expert in wanted:
        left[layer].append(expert)
    switches: list[RoleSwitch] = []
    while any(left.values()):
        candidates = donors(topology)
        if not candidates:
            count = sum(map(len, left.values()))
            return (
                f"no attention rank can be spared to become an expert rank for {count} experts "
                "(only one without experts can, and never the last one)"
            )
        rank = min(candidates, key=lambda r: (tokens.get(r, 0), r))
        table = tuple(_row(left[layer][:num_slots], num_slots) for layer in placement.layers)
        left = {layer: experts[num_slots:] for layer, experts in left.items()}
        replaces = places[len(switches)] if len(switches) < len(places) else None
        switches.append(RoleSwitch(rank, replaces, table))
        topology = switched(topology, rank, replaces)
    return tuple(switches)


def asked_switch(
    topology: Topology,
    placement: ExpertPlacement,
    home: ExpertPlacement,
    num_slots: int,
    rank: RankId,
    places: Sequence[RankId],
) -> RoleSwitch | str:
    """The switch of a rank that somebody has named: missing experts first, then replicas that the
    instance had and has lost. Or why it makes no sense.
    """
    if rank not in topology.attention:
        return f"rank {rank} has no attention role to give up"
    if rank in topology.experts:
        return f"rank {rank} holds experts already (--expert-ranks puts them on ranks of their own)"
    if rank not in donors(topology):
        return f"rank {rank} is the last attention rank"
    missing: dict[LayerId, list[int]] = {layer: [] for layer in placement.layers}
    for layer, expert in placement.missing:
        missing[layer].append(expert)
    table = tuple(_row(missing[layer][:num_slots], num_slots) for layer in placement.layers)
    for reload in assign_replicas(placement.with_ranks({rank: table}), home):
        if reload.rank == rank:
            table = _with(table, placement.index_of[reload.layer], reload.slot, reload.expert)
    if all(expert == EMPTY for row in table for expert in row):
        return "no expert is missing, and none has fewer replicas than it had at the start"
    return RoleSwitch(rank, next(iter(places), None), table)


def _row(experts: Sequence[int], num_slots: int) -> tuple[int, ...]:
    return (*experts, *[EMPTY] * (num_slots - len(experts)))


def _with(table: Table, layer: int, slot: int, expert: int) -> Table:
    row = (*table[layer][:slot], expert, *table[layer][slot + 1 :])
    return (*table[:layer], row, *table[layer + 1 :])
