"""Literal memberships, so that a test says who is in and what lies where, and nothing else."""

from collections.abc import Mapping, Sequence

from revivemoe.ids import Epoch, LayerId, RankId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, ExpertPlacement, Table
from revivemoe.membership.topology import Topology

LAYERS = (LayerId(1), LayerId(2))


def ranks(*numbers: int) -> tuple[RankId, ...]:
    return tuple(RankId(n) for n in numbers)


def of_roles(epoch: int, attention: Sequence[int], experts: Sequence[int]) -> Topology:
    """Attention ranks come first; a rank may have both roles."""
    members = dict.fromkeys((*attention, *experts))
    return Topology(Epoch(epoch), ranks(*members), ranks(*attention), ranks(*experts))


def placed(
    tables: Mapping[int, Table], num_experts: int, layers: Sequence[LayerId] = LAYERS
) -> ExpertPlacement:
    slots = {RankId(rank): table for rank, table in tables.items()}
    return ExpertPlacement(num_experts=num_experts, layers=tuple(layers), slots=slots)


def membership(
    placement: ExpertPlacement,
    topology: Topology | None = None,
    dense: DenseGroups | None = None,
    epoch: int = 1,
) -> Membership:
    """Without a topology: the ranks that have slots, in both roles."""
    if topology is None:
        topology = of_roles(epoch, sorted(placement.slots), sorted(placement.slots))
    return Membership(topology, placement, dense)


def without_experts(topology: Topology, dense: DenseGroups | None = None) -> Membership:
    """Where only the ranks matter: every expert rank has one empty slot."""
    slots: dict[RankId, Table] = dict.fromkeys(topology.experts, ((EMPTY,),))
    return Membership(topology, ExpertPlacement(1, (LayerId(0),), slots), dense)
