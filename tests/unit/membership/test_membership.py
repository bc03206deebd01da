"""One epoch as a value: what follows from it, against brute force, and the way to another one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.memberships import membership, of_roles, placed, ranks

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId, SlotId
from revivemoe.membership.dense_groups import DenseGroups, form_groups
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, Reload, Table
from revivemoe.membership.topology import Topology, collocated
from revivemoe.messages.commands import Configure, DomainSpec

Pair = tuple[int, int]


# ---- any membership -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    num_experts: int
    num_layers: int
    width: int


SHAPES = st.builds(Shape, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))


def tables(shape: Shape) -> st.SearchStrategy[Table]:
    slot = st.integers(EMPTY, shape.num_experts - 1)
    row = st.tuples(*[slot] * shape.width)
    return st.tuples(*[row] * shape.num_layers)


@st.composite
def memberships(draw: st.DrawFn) -> Membership:
    """Ranks with either role or both, slots with anything in them, dense groups or none."""
    shape = draw(SHAPES)
    ids = draw(st.permutations(range(7)))[: draw(st.integers(1, 6))]
    roles = [draw(st.sampled_from(["attention", "both", "experts"])) for _ in ids]
    having = list(zip(ids, roles, strict=True))
    attention = [r for r, role in having if role != "experts"]
    experts = [r for r in attention if (r, "both") in having]
    experts += [r for r, role in having if role == "experts"]
    slots = {r: draw(tables(shape)) for r in experts}
    layers = tuple(LayerId(3 * i + 1) for i in range(shape.num_layers))
    return Membership(
        of_roles(draw(st.integers(1, 9)), attention, experts),
        placed(slots, shape.num_experts, layers),
        draw(dense_groups(ranks(*attention))) if attention else None,
    )


@st.composite
def dense_groups(draw: st.DrawFn, attention: tuple[RankId, ...]) -> DenseGroups | None:
    """Formed at the start, and perhaps once more since."""
    if not draw(st.booleans()):
        return None
    groups = form_groups(attention, draw(st.integers(1, len(attention))))
    spread = tuple(draw(st.sampled_from(attention)) for _ in range(groups.size))
    return DenseGroups(groups.size, groups.home, (spread,) if draw(st.booleans()) else ())


@st.composite
def with_losses(draw: st.DrawFn) -> tuple[Membership, frozenset[RankId], frozenset[RankId]]:
    """A membership, and two sets of ranks, some of which may not be members."""
    everybody = st.frozensets(st.sampled_from(ranks(*range(8))), max_size=4)
    return draw(memberships()), draw(everybody), draw(everybody)


@st.composite
def with_reloads(draw: st.DrawFn) -> tuple[Membership, list[Reload]]:
    """A membership, and experts for some of its slots, one for each."""
    present = draw(memberships())
    width, num_experts = present.placement.slots_per_rank, present.placement.num_experts
    places = [
        (r, layer, SlotId(s))
        for r in present.experts
        for layer in present.placement.layers
        for s in range(width)
    ]
    if not places:
        return present, []
    chosen = draw(st.lists(st.sampled_from(places), unique=True, max_size=6))
    expert = st.integers(0, num_experts - 1).map(ExpertId)
    return present, [Reload(*place, draw(expert)) for place in chosen]


# ---- what follows, by brute force -----------------------------------------------------------


def held(present: Membership) -> list[tuple[RankId, LayerId, SlotId, ExpertId]]:
    """Every slot that holds an expert."""
    return [
        (rank, layer, SlotId(slot), ExpertId(expert))
        for rank, table in sorted(present.placement.slots.items())
        for layer, row in zip(present.placement.layers, table, strict=True)
        for slot, expert in enumerate(row)
        if expert != EMPTY
    ]


def pairs(present: Membership) -> list[tuple[LayerId, ExpertId]]:
    """Every expert of every layer."""
    experts = range(present.placement.num_experts)
    return [(layer, ExpertId(e)) for layer in present.placement.layers for e in experts]


def missing_of(present: Membership) -> list[Pair]:
    there = {(layer, expert) for _, layer, _, expert in held(present)}
    return [pair for pair in pairs(present) if pair not in there]


def check_facts(present: Membership) -> None:
    """Everything derived is what one gets by looking at every slot."""
    everything, missing = held(present), missing_of(present)
    assert list(present.missing) == missing
    of_layer = [
        sum(at == layer for at, _ in missing) / present.placement.num_experts
        for layer in present.placement.layers
    ]
    assert present.missing_fraction == max(of_layer)
    for layer, expert in pairs(present):
        assert present.holders(layer, expert) == [
            (rank, slot) for rank, at, slot, e in everything if (at, e) == (layer, expert)
        ]
    assert present.sole_holders == {
        rank: {
            (layer, expert)
            for layer, expert in pairs(present)
            if {r for r, at, _, e in everything if (at, e) == (layer, expert)} == {rank}
        }
        for rank in present.experts
    }
    assert present.num_held == {
        rank: sum(r == rank for r, *_ in everything) for rank in present.experts
    }
    for rank in ranks(*range(8)):
        assert present.table_of(rank) == present.placement.slots.get(rank, ())
        assert present.shards_of(rank) == shards_by_hand(present, rank)
    named = [tuple(map(int, part.split(b"."))) for part in present.mask_key.split(b",") if part]
    assert named == missing


def shards_by_hand(present: Membership, rank: RankId) -> set[int]:
    groups = present.dense
    if groups is None:
        return set()
    healthy = [g for g in (*groups.home, *groups.extra) if all(r in present.attention for r in g)]
    return {shard for g in healthy for shard, holder in enumerate(g) if holder == rank}


@given(memberships())
def test_derived_facts(present: Membership) -> None:
    check_facts(present)
    check_facts(present)
    topology = present.topology
    assert (present.epoch, present.members) == (topology.epoch, topology.members)
    assert (present.attention, present.experts) == (topology.attention, topology.experts)


@given(with_losses())
def test_sole_holders_are_what_a_death_would_cost(
    drawn: tuple[Membership, frozenset[RankId], frozenset[RankId]],
) -> None:
    present, *_ = drawn
    for rank, sole in present.sole_holders.items():
        assert set(present.without({rank}).missing) - set(present.missing) == sole


# ---- the way to another one -----------------------------------------------------------------


@given(memberships())
def test_another_epoch_is_nothing_else(present: Membership) -> None:
    check_facts(present)
    later = present.at(Epoch(77))
    assert later.epoch == 77
    assert later.at(present.epoch) == present
    assert (later.placement, later.dense) == (present.placement, present.dense)
    check_facts(later)


@given(with_losses())
def test_the_survivors_keep_order_roles_and_slots(
    drawn: tuple[Membership, frozenset[RankId], frozenset[RankId]],
) -> None:
    present, lost, more = drawn
    check_facts(present)  # what is kept of it must not be taken for that of another
    left = present.without(lost)
    for before, after in (
        (present.members, left.members),
        (present.attention, left.attention),
        (present.experts, left.experts),
    ):
        assert after == tuple(r for r in before if r not in lost)
    assert left.epoch == present.epoch
    assert all(left.table_of(r) == present.table_of(r) for r in left.members)
    check_facts(left)
    assert left.without(more) == present.without(lost | more)
    assert present.without(()) == present


@given(with_losses())
def test_a_loss_ends_the_extra_groups_it_has_a_part_in(
    drawn: tuple[Membership, frozenset[RankId], frozenset[RankId]],
) -> None:
    present, lost, _ = drawn
    before, after = present.dense, present.without(lost).dense
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert (after.size, after.home) == (before.size, before.home)
        assert after.extra == tuple(g for g in before.extra if not set(g) & lost)


@given(with_losses())
def test_who_was_lost_comes_back_as_it_was(
    drawn: tuple[Membership, frozenset[RankId], frozenset[RankId]],
) -> None:
    present, lost, _ = drawn
    left = present.without(lost)
    check_facts(left)
    back = lost & set(present.members)
    again = left.joined(back, present.topology, present.placement.slots)
    assert (again.topology, again.placement) == (present.topology, present.placement)
    assert again.dense == left.dense, "but in no group that was formed meanwhile"
    check_facts(again)
    assert left.joined((), present.topology, {}) == left


@given(with_losses())
def test_some_come_back_with_other_tables(
    drawn: tuple[Membership, frozenset[RankId], frozenset[RankId]],
) -> None:
    present, lost, some = drawn
    back = lost & some & set(present.members)
    empty = ((EMPTY,) * present.placement.slots_per_rank,) * len(present.placement.layers)
    left = present.without(lost)
    if left.placement.slots_per_rank != present.placement.slots_per_rank:
        return  # no expert rank is left to be like
    again = left.joined(back, present.topology, dict.fromkeys(back & {*present.experts}, empty))
    assert again.topology == present.without(lost - back).topology
    assert list(again.missing) == missing_of(left), "they hold nothing"
    check_facts(again)


def test_nobody_joins_twice() -> None:
    with pytest.raises(AssertionError, match=r"\[1\] are members already"):
        APART.joined(ranks(1), APART.topology, {})


@given(with_reloads())
def test_reloads_lie_in_their_slots_alone(
    drawn: tuple[Membership, list[Reload]],
) -> None:
    present, reloads = drawn
    check_facts(present)
    wanted = {(r.rank, r.layer, r.slot): r.expert for r in reloads}
    there = {(rank, layer, slot): e for rank, layer, slot, e in held(present)}
    full, cleared = present.with_reloads(reloads), present.cleared(reloads)
    assert {(r, at, s): e for r, at, s, e in held(full)} == there | wanted
    kept = {place: e for place, e in there.items() if place not in wanted}
    assert {(r, at, s): e for r, at, s, e in held(cleared)} == kept
    for other in (full, cleared):
        assert (other.topology, other.dense) == (present.topology, present.dense)
        check_facts(other)
    assert cleared.with_reloads(reloads) == full
    assert full.cleared(reloads) == cleared
    check_facts(present)


@given(memberships())
def test_no_reloads_are_no_change(present: Membership) -> None:
    assert present.with_reloads([]) == present.cleared([]) == present


@given(with_losses())
def test_a_dense_group_is_formed_when_none_is_healthy(
    drawn: tuple[Membership, frozenset[RankId], frozenset[RankId]],
) -> None:
    present, lost, _ = drawn
    left = present.without(lost)
    full = left.with_dense_group()
    assert (full.topology, full.placement) == (left.topology, left.placement)
    if left.dense is None or not left.attention or left.dense.healthy(left.attention):
        assert full == left
    else:
        assert full.dense is not None
        assert full.dense.extra[:-1] == left.dense.extra
        held_shards = [full.shards_of(r) for r in full.attention]
        assert sorted(s for shards in held_shards for s in shards) == [*range(full.dense.size)]
    assert full.with_dense_group() == full
    check_facts(full)


def test_whoever_gives_the_attention_role_up_leaves_the_groups() -> None:
    """As a role switch does it: out, and back in another role."""
    present = Membership(
        of_roles(1, [0, 1], [2]),
        placed({2: ((0, 1), (0, 1))}, 2),
        DenseGroups(2, (), extra=(ranks(0, 1),)),
    )
    home, table = of_roles(1, [0], [1, 2]), ((EMPTY, EMPTY), (1, 0))
    switched = present.without({RankId(1)}).joined(ranks(1), home, {RankId(1): table})
    assert switched == Membership(
        home, placed({1: table, 2: ((0, 1), (0, 1))}, 2), DenseGroups(2, ())
    )
    dense = switched.with_dense_group().dense
    assert dense is not None
    assert dense.extra == (ranks(0, 0),)


# ---- what names the mask --------------------------------------------------------------------


def test_the_mask_is_named_by_what_is_missing_alone() -> None:
    whole = membership(placed({0: ((0, 1), (0, 1)), 1: ((1, 0), (1, 0))}, 2))
    assert whole.mask_key == b""
    assert whole.without(ranks(0)).mask_key == b"", "other ranks, the same experts"
    one = membership(placed({0: ((0, EMPTY), (1, EMPTY))}, 2))
    assert one.mask_key == b"1.1,2.0"
    other = membership(placed({5: ((EMPTY, 0), (EMPTY, 1)), 6: ((0, 0), (1, 1))}, 2), epoch=9)
    assert other.mask_key == one.mask_key
    assert membership(placed({0: ((EMPTY, 1), (1, EMPTY))}, 2)).mask_key != one.mask_key


# ---- what a constructor refuses -------------------------------------------------------------

APART = Membership(
    of_roles(1, [0, 1], [2, 3]),
    placed({2: ((0, 1), (0, 1)), 3: ((2, 3), (2, 3))}, 4),
    DenseGroups(2, (ranks(0, 1),), extra=(ranks(1, 1),)),
)
TWO = ((0, 1), (0, 1))
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a member twice": (
        {"topology": Topology(Epoch(1), ranks(0, 1, 1, 2, 3), ranks(0, 1), ranks(2, 3))},
        "a member twice",
    ),
    "a member without a role": (
        {"topology": Topology(Epoch(1), ranks(0, 1, 2, 3, 4), ranks(0, 1), ranks(2, 3))},
        "has no role",
    ),
    "a role of a stranger": (
        {"topology": Topology(Epoch(1), ranks(0, 1, 2), ranks(0, 1), ranks(2, 3))},
        "has no role",
    ),
    "an expert rank without slots": ({"placement": placed({2: TWO}, 4)}, "ranks with slots"),
    "slots of a rank without the role": (
        {"placement": placed({1: TWO, 2: TWO, 3: TWO}, 4)},
        "ranks with slots",
    ),
    "slots in too few layers": (
        {"placement": placed({2: TWO, 3: TWO[:1]}, 4)},
        "rank 3 has slots in 1 layers of 2",
    ),
    "slots in too many layers": (
        {"placement": placed({2: TWO, 3: (*TWO, (0, 1))}, 4)},
        "rank 3 has slots in 3 layers of 2",
    ),
    "more slots on one rank": (
        {"placement": placed({2: TWO, 3: ((0, 1, 2), (0, 1, 2))}, 4)},
        "rank 2 has other slots",
    ),
    "more slots in one layer": (
        {"placement": placed({2: TWO, 3: ((0, 1), (0, 1, 2))}, 4)},
        "rank 3 has other slots",
    ),
    "a dense group of a stranger": (
        {"dense": DenseGroups(2, (), extra=(ranks(0, 7),))},
        "ranks that are not there",
    ),
    "a dense group of an expert rank": (
        {"dense": DenseGroups(2, (), extra=(ranks(0, 1), ranks(0, 2)))},
        "ranks that are not there",
    ),
}
WAYS: dict[str, Callable[[dict[str, Any]], Membership]] = {
    "built": lambda broken: Membership(
        **{"topology": APART.topology, "placement": APART.placement, "dense": APART.dense} | broken
    ),
    "replaced": lambda broken: msgspec.structs.replace(APART, **broken),
    "decoded": lambda broken: msgspec.convert(
        msgspec.to_builtins(APART, str_keys=False)
        | {name: msgspec.to_builtins(part) for name, part in broken.items()},
        Membership,
        str_keys=True,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_is_refused(case: str, way: str) -> None:
    broken, says = BROKEN[case]
    with pytest.raises((AssertionError, msgspec.ValidationError), match=says):
        WAYS[way](broken)


def test_what_a_rank_has_lost_at_home_is_no_fault() -> None:
    """Groups of the start keep their names: they are healthy again when all are back."""
    assert APART.without(ranks(0)).dense == APART.dense
    assert APART.without(ranks(0, 1, 2, 3)) == Membership(
        of_roles(1, [], []), placed({}, 4), DenseGroups(2, (ranks(0, 1),))
    )


# ---- as a value -----------------------------------------------------------------------------


@given(memberships())
def test_it_comes_through_the_wire_as_it_was(present: Membership) -> None:
    for _ in range(2):  # before and after what follows from it has been worked out
        sent = msgspec.msgpack.encode(present)
        got = msgspec.msgpack.decode(sent, type=Membership)
        assert got == present
        check_facts(got)
        check_facts(present)
    asked = Configure(3, present, DomainSpec("shm", weights={RankId(1): "ipc://x"}), wake=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(asked), type=Configure) == asked
    assert asked.epoch == present.epoch


def test_it_never_changes() -> None:
    for part, name in ((APART, "dense"), (APART.topology, "epoch"), (APART.placement, "slots")):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(part, name, None)


def test_what_follows_is_worked_out_once() -> None:
    present = membership(placed({0: TWO, 1: TWO}, 4), collocated(Epoch(1), 2))
    assert present.missing is present.missing
    assert present.sole_holders is present.sole_holders
    assert present.num_held is present.num_held
    assert present.mask_key is present.mask_key
    assert present.at(Epoch(2)).missing is present.missing, "also for the next epoch"
