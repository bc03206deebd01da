"""Who is a member of an epoch, in which role, under which logical rank."""

from functools import cached_property

import msgspec

from revivemoe.ids import Epoch, LogicalRank, RankId


class Topology(msgspec.Struct, frozen=True, dict=True):
    """Members of one epoch. Logical ranks are positions in `members`: compact by construction."""

    epoch: Epoch
    members: tuple[RankId, ...]
    attention: tuple[RankId, ...]
    """Members that hold attention weights, scheduler and KV cache, in logical order."""
    experts: tuple[RankId, ...]
    """Members that hold expert slots, in logical order. Collocated: equal to `attention`."""

    @cached_property
    def _places(self) -> dict[RankId, LogicalRank]:
        return {rank: LogicalRank(place) for place, rank in enumerate(self.members)}

    def logical_rank(self, rank: RankId) -> LogicalRank:
        """Dense index of `rank`. Raises KeyError if it is not a member."""
        return self._places[rank]

    def places(self, ranks: tuple[RankId, ...]) -> tuple[LogicalRank, ...]:
        """Logical ranks of these members."""
        return tuple(self.logical_rank(rank) for rank in ranks)

    def roles(self, rank: RankId) -> list[str]:
        """Role names as the status document spells them."""
        pairs = (("attention", self.attention), ("expert", self.experts))
        return [name for name, ranks in pairs if rank in ranks]


def deployment(epoch: Epoch, attention_ranks: int, expert_ranks: int) -> Topology:
    """The topology an instance starts with. No expert ranks of their own: collocated."""
    if expert_ranks:
        return disaggregated(epoch, attention_ranks, expert_ranks)
    return collocated(epoch, attention_ranks)


def collocated(epoch: Epoch, num_ranks: int) -> Topology:
    """Every rank holds attention and experts."""
    ranks = tuple(RankId(r) for r in range(num_ranks))
    return _of_roles(epoch, ranks, ranks)


def disaggregated(epoch: Epoch, attention_ranks: int, expert_ranks: int) -> Topology:
    """The first ranks hold attention, those after them experts."""
    ranks = tuple(RankId(r) for r in range(attention_ranks + expert_ranks))
    return _of_roles(epoch, ranks[:attention_ranks], ranks[attention_ranks:])


def default_microbatches(topology: Topology) -> int:
    """Two where attention and experts can work at the same time, on ranks of their own."""
    return 1 if set(topology.attention) & set(topology.experts) else 2


def _of_roles(epoch: Epoch, attention: tuple[RankId, ...], experts: tuple[RankId, ...]) -> Topology:
    both = set(attention)
    members = (*attention, *(r for r in experts if r not in both))
    return Topology(epoch=epoch, members=members, attention=attention, experts=experts)


def donors(topology: Topology) -> tuple[RankId, ...]:
    """Attention ranks that could become expert ranks: those without experts, never the last."""
    if len(topology.attention) < 2:
        return ()
    experts = set(topology.experts)
    return tuple(r for r in topology.attention if r not in experts)


def switched(topology: Topology, donor: RankId, replaced: RankId | None) -> Topology:
    """`topology` with an attention rank as an expert rank, in the place of `replaced`.

    That one may still be there: without it, the donor has its number among the expert ranks.
    """
    attention = tuple(r for r in topology.attention if r != donor)
    at = len(topology.experts)
    if replaced in topology.experts:
        at = topology.experts.index(replaced)
    experts = (*topology.experts[:at], donor, *topology.experts[at:])
    return _of_roles(topology.epoch, attention, experts)


def without(topology: Topology, lost: frozenset[RankId]) -> Topology:
    """`topology` of the survivors in their old order, so logical ranks close up."""

    def keep(ranks: tuple[RankId, ...]) -> tuple[RankId, ...]:
        return tuple(r for r in ranks if r not in lost)

    return _of_roles(topology.epoch, keep(topology.attention), keep(topology.experts))


def joined(topology: Topology, ranks: tuple[RankId, ...], home: Topology) -> Topology:
    """`topology` with `ranks` back in the roles and the order they have in `home`."""

    def add(present: tuple[RankId, ...], role: tuple[RankId, ...]) -> tuple[RankId, ...]:
        both = {*present, *set(ranks).intersection(role)}
        return tuple(sorted(both, key=home.logical_rank))

    attention = add(topology.attention, home.attention)
    return _of_roles(topology.epoch, attention, add(topology.experts, home.experts))
