"""Who is a member of an epoch, in which role, under which logical rank."""

import msgspec

from revivemoe.ids import Epoch, LogicalRank, RankId


class Topology(msgspec.Struct, frozen=True):
    """Members of one epoch. Logical ranks are positions in `members`: compact by construction."""

    epoch: Epoch
    members: tuple[RankId, ...]
    attention: tuple[RankId, ...]
    """Members that hold attention weights, scheduler and KV cache, in logical order."""
    experts: tuple[RankId, ...]
    """Members that hold expert slots, in logical order. Collocated: equal to `attention`."""

    def logical_rank(self, rank: RankId) -> LogicalRank:
        """Dense index of `rank`. Raises ValueError if it is not a member."""
        return LogicalRank(self.members.index(rank))

    def roles(self, rank: RankId) -> list[str]:
        """Role names as the status document spells them."""
        pairs = (("attention", self.attention), ("expert", self.experts))
        return [name for name, ranks in pairs if rank in ranks]


def collocated(epoch: Epoch, num_ranks: int) -> Topology:
    """Every rank holds attention and experts."""
    ranks = tuple(RankId(r) for r in range(num_ranks))
    return Topology(epoch=epoch, members=ranks, attention=ranks, experts=ranks)


def without(topology: Topology, lost: frozenset[RankId], epoch: Epoch) -> Topology:
    """The next epoch's topology: the survivors in their old order, so logical ranks close up."""

    def keep(ranks: tuple[RankId, ...]) -> tuple[RankId, ...]:
        return tuple(r for r in ranks if r not in lost)

    return Topology(
        epoch=epoch,
        members=keep(topology.members),
        attention=keep(topology.attention),
        experts=keep(topology.experts),
    )


def joined(topology: Topology, ranks: tuple[RankId, ...], home: Topology) -> Topology:
    """`topology` with `ranks` back in the roles and the order they have in `home`."""

    def add(present: tuple[RankId, ...], role: tuple[RankId, ...]) -> tuple[RankId, ...]:
        both = {*present, *(r for r in ranks if r in role)}
        return tuple(sorted(both, key=home.members.index))

    return Topology(
        epoch=topology.epoch,
        members=add(topology.members, home.members),
        attention=add(topology.attention, home.attention),
        experts=add(topology.experts, home.experts),
    )
