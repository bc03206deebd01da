"""One epoch as a value: who is in, in which role, which expert lies where, who shares what.

Everything that depends on the membership takes this one value. It never changes: a change of the
membership is another value, under another epoch.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import msgspec

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId
from revivemoe.membership import topology as roles
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.placement import (
    EMPTY,
    ExpertOfLayer,
    ExpertPlacement,
    Holder,
    Reload,
    Table,
)
from revivemoe.membership.topology import Topology


class Membership(msgspec.Struct, frozen=True, dict=True):
    """Topology, expert placement and dense groups of one epoch. Derived facts are kept."""

    topology: Topology
    placement: ExpertPlacement
    dense: DenseGroups | None = None
    """Groups that share the dense feed-forward layers, if they are shared."""

    def __post_init__(self) -> None:
        topology, placement = self.topology, self.placement
        attention, experts = set(topology.attention), set(topology.experts)
        assert len(set(topology.members)) == len(topology.members), "a rank is a member twice"
        assert set(topology.members) == attention | experts, "a member has no role"
        assert placement.slots.keys() == experts, "the ranks with slots are the expert ranks"
        width, depth = placement.slots_per_rank, len(placement.layers)
        for rank, table in placement.slots.items():
            assert len(table) == depth, f"rank {rank} has slots in {len(table)} layers of {depth}"
            assert all(len(row) == width for row in table), f"rank {rank} has other slots"
        if self.dense is not None:
            extra = {rank for group in self.dense.extra for rank in group}
            assert extra <= attention, "a dense group was formed of ranks that are not there"

    # ---- who ---------------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        return self.topology.epoch

    @property
    def members(self) -> tuple[RankId, ...]:
        return self.topology.members

    @property
    def attention(self) -> tuple[RankId, ...]:
        return self.topology.attention

    @property
    def experts(self) -> tuple[RankId, ...]:
        return self.topology.experts

    # ---- what lies where: worked out once ------------------------------------------------------

    @property
    def missing(self) -> tuple[ExpertOfLayer, ...]:
        """Experts that no rank holds, sorted by (layer, expert)."""
        return self.placement.missing

    @property
    def missing_fraction(self) -> float:
        """Largest share of one layer's experts that no rank holds."""
        return self.placement.missing_fraction

    @property
    def sole_holders(self) -> dict[RankId, set[ExpertOfLayer]]:
        """For each expert rank, the experts that would be gone if it died now."""
        return self.placement.sole_holders

    def holders(self, layer: LayerId, expert: ExpertId) -> list[Holder]:
        """Every (rank, slot) that holds this expert, by rank."""
        return self.placement.holders(layer, expert)

    def table_of(self, rank: RankId) -> Table:
        """What the slots of a rank hold, [L][S]; () without the expert role."""
        return self.placement.slots.get(rank, ())

    @cached_property
    def num_held(self) -> dict[RankId, int]:
        """Slots of each expert rank that hold an expert."""
        tables = self.placement.slots.items()
        return {rank: sum(e != EMPTY for row in table for e in row) for rank, table in tables}

    @cached_property
    def mask_key(self) -> bytes:
        """Names the set of missing experts: KV is shared only among requests under the same set."""
        return ",".join(f"{layer}.{expert}" for layer, expert in self.missing).encode()

    def shards_of(self, rank: RankId) -> frozenset[int]:
        """Shards of the dense layers that `rank` is to hold."""
        return frozenset() if self.dense is None else self.dense.shards_of(rank, self.attention)

    # ---- the way to another one --------------------------------------------------------------

    def at(self, epoch: Epoch) -> "Membership":
        """The same under another epoch."""
        topology = msgspec.structs.replace(self.topology, epoch=epoch)
        return msgspec.structs.replace(self, topology=topology)

    def without(self, lost: Collection[RankId]) -> "Membership":
        """The survivors in their old order, with what they hold."""
        lost = frozenset(lost)
        dense = self.dense.without(lost) if self.dense is not None else None
        return Membership(roles.without(self.topology, lost), self.placement.without(lost), dense)

    def joined(
        self, back: Collection[RankId], home: Topology, tables: Mapping[RankId, Table]
    ) -> "Membership":
        """With `back` in the roles and the order they have in `home`, holding `tables`."""
        assert not set(back) & set(self.members), f"{sorted(back)} are members already"
        held = {rank: tables[rank] for rank in back if tables.get(rank)}
        topology = roles.joined(self.topology, tuple(back), home)
        return Membership(topology, self.placement.with_ranks(held), self.dense)

    def with_reloads(self, reloads: Iterable[Reload]) -> "Membership":
        """Once these experts are in their slots."""
        placement = self.placement.with_reloads(reloads)
        return msgspec.structs.replace(self, placement=placement)

    def holding(self, tables: Mapping[RankId, Table]) -> "Membership":
        """With what those of its ranks truly hold that are named in `tables`."""
        slots = self.placement.slots
        told = {r: t for r, t in tables.items() if r in slots and t and t != slots[r]}
        if not told:
            return self
        rest = self.placement.without(frozenset(told))
        return msgspec.structs.replace(self, placement=rest.with_ranks(told))

    def cleared(self, slots: Iterable[Reload]) -> "Membership":
        """While these slots are being loaded: nobody is sent there."""
        return msgspec.structs.replace(self, placement=self.placement.cleared(slots))

    def with_dense_group(self) -> "Membership":
        """With at least one healthy dense group, if dense layers are shared."""
        if self.dense is None:
            return self
        return msgspec.structs.replace(self, dense=self.dense.completed(self.attention))
