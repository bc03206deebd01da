"""The one step loop, answered by hand: the effects it asks for, in which order, and what it says.

No driver stands here: a test answers each effect with a literal value, or throws what a driver may
throw. The ranks are real.
"""

from collections.abc import Callable
from typing import TypeVar

import pytest
from core_harness import limits, spec
from unit.memberships import membership, of_roles, placed

from revivemoe.core.effects import (
    Broken,
    Commands,
    Departure,
    Effect,
    Enter,
    Exchange,
    Forward,
    GiveUpAttention,
    Leave,
    Left,
    Load,
    LoadBeside,
    Loaded,
    LoadFailed,
    Place,
    Ran,
    Reach,
)
from revivemoe.core.loop import StepLoop
from revivemoe.core.rank import Rank
from revivemoe.core.slots import ExpertSlots
from revivemoe.core.state import Fenced, InDomain, Parked
from revivemoe.core.step import Batch, StepHeader, StepResult
from revivemoe.ids import Epoch, ExpertId, Incarnation, LayerId, RankId, SeqId, SlotId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.membership import Membership
from revivemoe.messages.commands import (
    Abort,
    Add,
    Command,
    Configure,
    DomainSpec,
    Fence,
    Inject,
    LoadExperts,
    SlotLoad,
    Stop,
    SwitchRole,
    TellHoldings,
    Wake,
)
from revivemoe.messages.reports import (
    ExpertsLoaded,
    FenceAck,
    Holdings,
    NonFinite,
    Ready,
    Report,
    Resumed,
    StepAborted,
    Tokens,
)
from revivemoe.messages.tally import Tally

E = TypeVar("E", bound=Effect)
ME, FIRST = RankId(0), Incarnation(1)
DOMAIN = DomainSpec("literal")
ALONE = membership(placed({0: ((0, 1), (0, 1))}, 2))
"""One rank with everything."""
PAIR = membership(placed({0: ((0,), (0,)), 1: ((1,), (1,))}, 2))
APART = membership(placed({1: ((0, 1), (0, 1))}, 2), of_roles(1, [0], [1]))
SWITCHED = membership(placed({0: ((0, 1), (0, 1))}, 2), of_roles(1, [1], [0]))
"""Rank 0 is an expert rank."""
NOTHING = Departure(None, 0.0)
QUICKLY = Loaded(0.0, 0, {})
HELD = ((0, 1), (0, 1))
"""In the slots of each rank here, unless a load has begun."""
TOKEN = 3


class Hand:
    """One rank's loop: what it wants now, what it has said. Every answer is the test's."""

    def __init__(self, rank_id: int = 0, **changes: int) -> None:
        self.slots = ExpertSlots({LayerId(1): (0, 1), LayerId(2): (0, 1)})
        self.rank = Rank(RankId(rank_id), FIRST, limits(**changes), self.slots)
        self.told: list[Report] = []
        self.counted: list[Tally] = []
        """What heartbeats would have told at each report."""
        self.loop = StepLoop(self.rank, "cpu", self._say)
        self._steps = self.loop.run()
        self.wants: Effect | None = next(self._steps)

    def _say(self, report: Report) -> None:
        self.told.append(report)
        self.counted.append(self.loop.holdings)

    def answer(self, kind: type[E], answer: object = None) -> E:
        """Answer the present effect, which has to be of this kind. Returns it."""
        wanted = self._take(kind)
        self._go_on(lambda: self._steps.send(answer))
        return wanted

    def throw(self, kind: type[E], interruption: Exception) -> E:
        """Interrupt the present effect, which has to be of this kind. Returns it."""
        wanted = self._take(kind)
        self._go_on(lambda: self._steps.throw(interruption))
        return wanted

    def _take(self, kind: type[E]) -> E:
        wanted = self.wants
        assert isinstance(wanted, kind), f"{wanted} instead of {kind.__name__}"
        return wanted

    def _go_on(self, step: Callable[[], Effect]) -> None:
        try:
            self.wants = step()
        except StopIteration:
            self.wants = None

    # ---- what tests do over and over ---------------------------------------------------------

    def command(self, *commands: Command) -> Commands:
        return self.answer(Commands, list(commands))

    def enter(self, configured: Configure, *more: Command) -> None:
        """Into an epoch; up to the first step."""
        self.command(configured, *more)
        self.answer(Load, QUICKLY)
        self.answer(Enter, 0.0)

    def to_exchange(self) -> StepHeader:
        """To the exchange of headers: this rank's own."""
        self.answer(Reach)
        assert isinstance(self.wants, Exchange)
        return self.wants.header

    def to_forward(self) -> Batch:
        """All agree with this rank alone; up to the forward."""
        self.answer(Exchange, [self.to_exchange()])
        self.answer(Reach)
        assert isinstance(self.wants, Forward)
        return self.wants.batch

    def step(self) -> None:
        """One whole step of a rank on its own."""
        batch = self.to_forward()
        self.answer(Forward, ran(batch))
        self.answer(Reach)

    def names(self) -> list[str]:
        """What it has said, by kind."""
        return [type(report).__name__ for report in self.told]


def ran(batch: Batch) -> Ran:
    return Ran([StepResult(TOKEN if item.samples else None) for item in batch.items], 0.25)


def configure(present: Membership = ALONE, step: int = 0, wake: int = 0) -> Configure:
    return Configure(step, present, DOMAIN, wake)


def add(seq_id: int = 0, max_tokens: int = 4) -> Add:
    return Add(spec(seq_id, [1, 2, 3], max_tokens))


def stepping(**changes: int) -> Hand:
    """In an epoch of its own, with a sequence; before its first step."""
    hand = Hand(**changes)
    hand.enter(configure(), add())
    return hand


def waits(hand: Hand) -> bool:
    """Whether it asks for commands, and has nothing else to do."""
    return hand.wants == Commands(wait=True)


# ---- the whole way --------------------------------------------------------------------------


def test_from_configure_to_tokens() -> None:
    hand = Hand()
    assert waits(hand)
    asked = configure(step=5)
    hand.command(asked, add())
    table = ALONE.table_of(ME)
    assert hand.wants == Load(ALONE, table, DOMAIN, frozenset())
    hand.answer(Load, Loaded(0.5, 300, {"peer": 1, "disk": 2}))
    assert hand.wants == Enter(asked)
    hand.answer(Enter, 0.125)
    assert hand.wants == Reach("schedule"), "with what came behind the configuration"
    hand.answer(Reach)
    assert hand.told == []
    header = StepHeader(epoch=1, step=5, num_tokens=3, has_work=1, wake=0)
    assert hand.wants == Exchange(header)
    hand.answer(Exchange, [header])
    assert hand.wants == Reach("attention", 3)
    resumed = Resumed(
        ME, FIRST, Epoch(1), 5, domain_s=0.125, experts_s=0.5,
        experts_loaded=3, experts_bytes=300, experts_sources={"peer": 1, "disk": 2},
    )  # fmt: skip
    assert hand.told == [resumed]
    hand.answer(Reach)
    assert isinstance(hand.wants, Forward)
    (item,) = hand.wants.batch.items
    assert (hand.wants.batch.step, item.start, item.count, item.samples) == (5, 0, 3, True)
    hand.answer(Forward, ran(hand.wants.batch))
    assert hand.wants == Reach("commit", 3)
    assert hand.told == [resumed], "nothing is final before the commit"
    hand.answer(Reach)
    (tokens,) = hand.told[1:]
    assert isinstance(tokens, Tokens)
    assert (tokens.epoch, tokens.step, tokens.step_s) == (1, 5, 0.25)
    assert [(t.seq_id, t.position, t.token_id) for t in tokens.tokens] == [(0, 0, TOKEN)]
    assert hand.wants == Commands(wait=False)


def test_an_epoch_brings_its_shards_and_its_mask() -> None:
    dense = DenseGroups(2, (), extra=((ME, ME),))
    degraded = membership(placed({0: ((0,), (1,))}, 2), dense=dense)
    hand = Hand()
    hand.command(configure(degraded), add())
    assert hand.wants == Load(degraded, ((0,), (1,)), DOMAIN, frozenset({0, 1}))
    hand.answer(Load, QUICKLY)
    hand.answer(Enter, 0.0)
    assert hand.rank.state == InDomain(Epoch(1), 0, b"1.1,2.0")


def test_a_sequence_to_its_end_then_it_parks() -> None:
    hand = stepping()
    for _ in range(4):
        hand.step()
        assert hand.command() == Commands(wait=False)
    assert hand.names() == ["Resumed", *["Tokens"] * 4], "it has resumed once"
    hand.answer(Exchange, [hand.to_exchange()])
    assert waits(hand)
    assert isinstance(hand.rank.state, Parked)
    hand.command()
    assert waits(hand), "nothing has come"
    hand.command(add(seq_id=1), Wake(1))
    assert hand.wants == Reach("schedule")


def test_a_step_without_tokens_of_its_own_serves_the_others() -> None:
    hand = Hand()
    hand.enter(configure(PAIR))
    mine = hand.to_exchange()
    assert (mine.num_tokens, mine.has_work) == (0, 0)
    hand.answer(Exchange, [mine, mine._replace(num_tokens=4, has_work=1)])
    assert hand.wants == Reach("attention", 0)
    hand.answer(Reach)
    assert hand.answer(Forward, Ran([], 0.25)).batch.items == ()
    hand.answer(Reach)
    assert hand.names() == ["Resumed"], "no tokens, no message"
    assert hand.wants == Commands(wait=False)
    hand.command()
    assert hand.to_exchange().step == 1


def test_while_some_have_not_seen_the_wake_all_agree_again() -> None:
    hand = Hand()
    hand.enter(configure(PAIR))
    mine = hand.to_exchange()
    hand.answer(Exchange, [mine, mine._replace(wake=1)])
    assert hand.wants == Commands(wait=False), "not parked"
    hand.command()
    assert hand.to_exchange() == mine, "the same step number"


def test_it_has_resumed_only_when_all_have_agreed() -> None:
    """Each member's header names the epoch: before that it is not known who is there."""
    hand = stepping()
    hand.to_exchange()
    assert hand.told == []
    hand.throw(Exchange, Broken("a peer is gone"))
    hand.answer(Leave, NOTHING)
    assert hand.names() == ["StepAborted"], "it never resumed"


# ---- what it holds --------------------------------------------------------------------------


def test_what_is_told_with_heartbeats_counts_what_has_been_reported() -> None:
    hand = stepping()
    assert hand.loop.holdings == (1, 0, 0)
    hand.step()
    assert hand.counted[-1] == (1, 0, 0), "not before its tokens are on their way"
    assert hand.loop.holdings == (1, 1, 0)
    hand.command(add(seq_id=6), add(seq_id=3))
    assert hand.loop.holdings == (3, 1, 6 ^ 3)
    hand.to_forward()
    hand.throw(Forward, Left("fenced"))
    hand.answer(Leave, NOTHING)
    assert hand.loop.holdings == (3, 1, 6 ^ 3), "what is undone has never been"
    hand.command(Abort(SeqId(6)), Abort(SeqId(77)))
    assert hand.loop.holdings == (2, 1, 3)


def test_adds_count_while_a_configuration_behind_them_is_carried_out() -> None:
    hand = Hand()
    hand.command(add(), configure())
    assert isinstance(hand.wants, Load)
    assert hand.loop.holdings == (1, 0, 0)


def test_a_finished_sequence_is_not_held_any_more() -> None:
    hand = Hand()
    hand.enter(configure(), add(seq_id=5, max_tokens=1))
    hand.step()
    assert hand.loop.holdings == (0, 0, 0)


@pytest.mark.parametrize("parked", [False, True])
def test_it_tells_what_it_holds_behind_every_token(parked: bool) -> None:
    hand = stepping()
    hand.step()
    if parked:
        hand.command(Abort(SeqId(0)))
        hand.answer(Exchange, [hand.to_exchange()])
    hand.command(TellHoldings(7))
    held = {} if parked else {SeqId(0): 1}
    assert hand.told[-1] == Holdings(ME, FIRST, 7, held)
    assert hand.names() == ["Resumed", "Tokens", "Holdings"]
    assert waits(hand) == parked


# ---- fences ---------------------------------------------------------------------------------


def test_whose_numbers_they_were_is_said_before_the_fence_is_acknowledged() -> None:
    """A fence inside the forward, and a NaN that was found there."""
    hand = stepping()
    hand.step()
    hand.command()
    batch = hand.to_forward()
    hand.told.clear()
    hand.throw(Forward, Left("fenced"))
    assert hand.wants == Leave(batch), "what it has written is zeroed"
    assert hand.told == []
    hand.answer(Leave, Departure(Place(1, "experts", True), 0.5))
    claim = NonFinite(ME, FIRST, Epoch(1), 1, 1, "experts", True)
    assert hand.told == [claim]
    assert waits(hand), "it has left, and waits for the fence"
    assert isinstance(hand.rank.state, InDomain)
    assert hand.rank.state.open is None, "rolled back"
    hand.command(Fence(Epoch(2)))
    assert hand.wants == Leave(None), "zeroed once"
    hand.answer(Leave, Departure(None, 0.125))
    held = {SeqId(0): 1}
    ack = FenceAck(ME, FIRST, Epoch(2), 1, held, rolled_back=True, rollback_s=0.125, slots=HELD)
    assert hand.told == [claim, ack]
    assert waits(hand)
    hand.rank.check_invariants()


def test_a_step_undone_is_told_with_one_fence_only() -> None:
    hand = stepping()
    hand.to_forward()
    hand.throw(Forward, Left("fenced"))
    hand.answer(Leave, NOTHING)
    for epoch in (2, 3):
        hand.command(Fence(Epoch(epoch)))
        hand.answer(Leave, NOTHING)
    acks = [report for report in hand.told if isinstance(report, FenceAck)]
    assert [(a.epoch, a.rolled_back) for a in acks] == [(2, True), (3, False)]


def test_a_fence_between_steps_undoes_nothing() -> None:
    hand = stepping()
    hand.step()
    hand.command(Fence(Epoch(2)))
    assert hand.wants == Leave(None)
    hand.answer(Leave, Departure(None, 0.25))
    ack = FenceAck(
        ME, FIRST, Epoch(2), 1, {SeqId(0): 1}, rolled_back=False, rollback_s=0.25, slots=HELD
    )
    assert hand.told[-1] == ack
    assert waits(hand)


def test_a_stale_fence_is_not_answered() -> None:
    hand = stepping()
    hand.step()
    hand.command(Fence(Epoch(5)))
    hand.answer(Leave, NOTHING)
    told = list(hand.told)
    hand.command(Fence(Epoch(4)))
    hand.answer(Leave, NOTHING)
    assert hand.told == told
    assert hand.rank.state == Fenced(Epoch(5), 1)


def test_a_fence_at_the_boundary_is_agreed_on_in_the_exchange() -> None:
    hand = stepping()
    hand.step()
    hand.command(Fence(Epoch(2), at_boundary=True))
    assert hand.wants == Reach("schedule"), "not at once"
    header = hand.to_exchange()
    assert header.leave == 2
    hand.answer(Exchange, [header])
    assert hand.wants == Leave(None), "the forward was not begun"
    hand.answer(Leave, Departure(None, 0.25))
    ack = FenceAck(
        ME, FIRST, Epoch(2), 1, {SeqId(0): 1}, rolled_back=False, rollback_s=0.25, slots=HELD
    )
    assert hand.told[-1] == ack
    assert waits(hand)


def test_who_has_not_heard_of_the_boundary_leaves_with_the_others() -> None:
    hand = Hand()
    hand.enter(configure(PAIR), add())
    mine = hand.to_exchange()
    assert mine.leave == 0
    hand.answer(Exchange, [mine, mine._replace(leave=7)])
    hand.answer(Leave, NOTHING)
    assert isinstance(hand.told[-1], FenceAck)
    assert (hand.told[-1].epoch, hand.told[-1].next_step) == (7, 0)
    hand.command(Fence(Epoch(7), at_boundary=True))
    hand.answer(Leave, NOTHING)
    assert isinstance(hand.told[-1], FenceAck), "it came late: that is a boundary, too"
    assert not hand.told[-1].rolled_back


def test_outside_of_any_epoch_here_and_now_is_a_boundary() -> None:
    hand = Hand()
    hand.command(Fence(Epoch(1), at_boundary=True))
    hand.answer(Leave, NOTHING)
    assert hand.told == [FenceAck(ME, FIRST, Epoch(1), 0, {}, rolled_back=False, slots=HELD)]
    assert waits(hand)


# ---- what breaks ----------------------------------------------------------------------------


def test_a_broken_exchange_commits_nothing_and_the_next_epoch_goes_on() -> None:
    hand = stepping()
    hand.step()
    hand.command()
    hand.to_exchange()
    hand.throw(Exchange, Broken("peer 1 hung up"))
    assert hand.wants == Leave(None), "no forward has begun"
    hand.answer(Leave, NOTHING)
    assert hand.told[2:] == [StepAborted(ME, FIRST, Epoch(1), 1, "peer 1 hung up")]
    assert waits(hand), "it accuses nobody and waits"
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    ack = hand.told[-1]
    assert ack == FenceAck(ME, FIRST, Epoch(2), 1, {SeqId(0): 1}, rolled_back=True, slots=HELD)
    hand.enter(configure(ALONE.at(Epoch(2)), step=4))
    hand.step()
    resumed, tokens = hand.told[-2:]
    assert isinstance(resumed, Resumed)
    assert isinstance(tokens, Tokens)
    assert (resumed.epoch, resumed.step) == (tokens.epoch, tokens.step) == (2, 4)
    assert [(t.position, t.token_id) for t in tokens.tokens] == [(1, TOKEN)], "none is left out"


def test_a_broken_forward_is_a_claim_and_then_an_aborted_step() -> None:
    hand = stepping()
    batch = hand.to_forward()
    hand.told.clear()
    hand.throw(Forward, Broken("NaN in the logits"))
    assert hand.answer(Leave, Departure(Place(-1, "sample", False), 0.0)).begun is batch
    assert hand.told == [
        NonFinite(ME, FIRST, Epoch(1), 0, -1, "sample", False),
        StepAborted(ME, FIRST, Epoch(1), 0, "NaN in the logits"),
    ]
    assert hand.rank.queues.live[SeqId(0)].output_ids == []


def test_a_domain_that_does_not_come_about_is_an_aborted_step() -> None:
    hand = Hand()
    hand.command(configure(step=3))
    hand.answer(Load, QUICKLY)
    hand.throw(Enter, Broken("no peer in 30 s"))
    hand.answer(Leave, NOTHING)
    assert hand.told == [StepAborted(ME, FIRST, Epoch(1), 3, "no peer in 30 s")]
    assert waits(hand)


@pytest.mark.parametrize("within", [Load, Enter])
def test_a_fence_on_the_way_into_an_epoch(within: type[Effect]) -> None:
    """No word of the epoch that never was; the next one is entered."""
    hand = Hand()
    hand.command(configure(), add())
    if within is Enter:
        hand.answer(Load, QUICKLY)
    hand.throw(within, Left("fenced"))
    assert hand.told == []
    assert waits(hand)
    assert SeqId(0) in hand.rank.queues.live, "what came behind is not lost"
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    assert hand.told == [
        FenceAck(ME, FIRST, Epoch(2), 0, {SeqId(0): 0}, rolled_back=False, slots=HELD)
    ]
    hand.enter(configure(ALONE.at(Epoch(2))))
    hand.step()
    assert hand.names() == ["FenceAck", "Resumed", "Tokens"]


def test_an_old_configuration_is_nothing() -> None:
    hand = stepping()
    hand.step()
    hand.command(Fence(Epoch(3)))
    hand.answer(Leave, NOTHING)
    hand.command(configure(ALONE.at(Epoch(2)), step=1))
    assert waits(hand)
    assert hand.rank.state == Fenced(Epoch(3), 1)


# ---- loads and roles ------------------------------------------------------------------------


def test_experts_that_cannot_be_loaded_for_an_epoch() -> None:
    hand = Hand()
    hand.command(configure())
    hand.throw(Load, LoadFailed("no such file"))
    assert hand.told == [ExpertsLoaded(ME, FIRST, 0, 0.0, 0, "no such file")]
    assert waits(hand), "it stays"
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    hand.enter(configure(ALONE.at(Epoch(2))), add())
    hand.step()
    assert hand.names() == ["ExpertsLoaded", "FenceAck", "Resumed", "Tokens"]


def test_experts_are_loaded_beside_the_steps() -> None:
    hand = stepping()
    hand.step()
    asked = LoadExperts(7, (SlotLoad(LayerId(1), SlotId(1), ExpertId(0)),))
    hand.command(asked, Abort(SeqId(0)))
    assert hand.wants == LoadBeside(asked)
    hand.answer(LoadBeside)
    assert not hand.rank.queues.live, "the batch of commands goes on"
    assert hand.wants == Reach("schedule")


def test_an_acknowledgement_tells_what_lies_in_the_slots() -> None:
    """Not what the map says: a load beside the steps is under way, then done, then another."""
    hand = stepping()
    hand.step()
    one, other = (SlotLoad(LayerId(n), SlotId(1), ExpertId(9)) for n in (1, 2))
    number = hand.slots.begin([one, other])
    hand.slots.check(number, one)
    hand.slots.fill(one)
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    hand.slots.fill(other)
    hand.command(Fence(Epoch(3), at_boundary=True))
    hand.answer(Leave, NOTHING)
    told = [r.slots for r in hand.told if isinstance(r, FenceAck)]
    assert told == [((0, 9), (0, -1)), ((0, 9), (0, 9))]


@pytest.mark.parametrize("interruption", [Left("fenced"), LoadFailed("no such file")])
def test_a_load_that_was_cut_short_is_told_as_it_is(interruption: Exception) -> None:
    hand = Hand()
    hand.command(configure())
    hand.slots.begin([SlotLoad(LayerId(1), SlotId(0), ExpertId(5))])
    hand.throw(Load, interruption)
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    (ack,) = [r for r in hand.told if isinstance(r, FenceAck)]
    assert ack.slots == ((-1, 1), (0, 1))


def test_a_role_switch_outside_of_the_epoch() -> None:
    hand = Hand()
    hand.command(SwitchRole(APART, ((1, 0), (0, -1)), DOMAIN))
    assert hand.wants == GiveUpAttention(2)
    assert hand.rank.limits.num_blocks == 0, "no sequences, no blocks"
    hand.answer(GiveUpAttention)
    assert hand.wants == Load(APART, ((1, 0), (0, -1)), DOMAIN)
    hand.answer(Load, Loaded(0.5, 300, {"peer": 3}))
    assert hand.told == [
        Ready(ME, FIRST, "cpu", 0, load_s=0.5, load_bytes=300, load_sources={"peer": 3})
    ]
    assert waits(hand)
    hand.enter(configure(SWITCHED))  # the role is not given up twice


def test_a_membership_that_takes_the_attention_role() -> None:
    hand = Hand()
    hand.command(configure(SWITCHED))
    assert hand.wants == GiveUpAttention(2)
    assert hand.rank.limits.num_blocks == 0
    hand.answer(GiveUpAttention)
    hand.answer(Load, QUICKLY)
    hand.answer(Enter, 0.0)
    mine = hand.to_exchange()
    hand.answer(Exchange, [mine._replace(num_tokens=3, has_work=1), mine])
    assert hand.names() == ["Resumed"]
    assert hand.wants == Reach("attention", 0), "it serves"


def test_a_membership_that_leaves_the_attention_role_takes_nothing() -> None:
    hand = Hand()
    hand.command(configure(APART))
    assert hand.answer(Load, QUICKLY).table == (), "and it holds no experts"


def test_a_fence_during_a_role_switch() -> None:
    hand = Hand()
    hand.command(SwitchRole(APART, ((0, 1), (0, 1)), DOMAIN))
    hand.answer(GiveUpAttention)
    hand.throw(Load, Left("fenced"))
    assert hand.told == []
    assert waits(hand)


def test_experts_for_a_role_switch_that_cannot_be_loaded() -> None:
    """The rank stays: it has no other role, and is ready for experts in this one."""
    hand = Hand()
    table = ((0, 1), (0, 1))
    hand.command(SwitchRole(APART, table, DOMAIN))
    hand.slots.resize(2)
    hand.answer(GiveUpAttention)
    hand.throw(Load, LoadFailed("no such file"))
    failed = ExpertsLoaded(ME, FIRST, 0, 0.0, 0, "no such file")
    assert hand.told == [failed, Ready(ME, FIRST, "cpu", 0, 0.0)]
    assert waits(hand)
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    (ack,) = [r for r in hand.told if isinstance(r, FenceAck)]
    assert ack.slots == ((-1, -1), (-1, -1))
    hand.enter(configure(SWITCHED.at(Epoch(2))))  # the role is not given up twice


@pytest.mark.parametrize("aside", [True, False], ids=["aside", "in the epoch"])
def test_no_memory_for_the_slots_of_a_new_role(aside: bool) -> None:
    """The slots are asked for again when it is to hold an expert."""
    hand, table = Hand(), SWITCHED.table_of(ME)
    empty = placed({0: ((-1, -1), (-1, -1))}, 2)
    nothing_for_it = membership(empty, of_roles(3, [1], [0]))
    told = SwitchRole(APART, table, DOMAIN) if aside else configure(SWITCHED)
    hand.command(told)
    hand.slots.resize(0)
    hand.throw(GiveUpAttention, LoadFailed("out of memory"))
    assert hand.told[0] == ExpertsLoaded(ME, FIRST, 0, 0.0, 0, "out of memory")
    assert hand.names()[1:] == ["Ready"] * aside
    assert waits(hand)
    hand.command(Fence(Epoch(2)))
    hand.answer(Leave, NOTHING)
    assert isinstance(hand.told[-1], FenceAck)
    assert hand.told[-1].slots == ()
    hand.enter(configure(nothing_for_it))
    hand.to_exchange()
    hand.throw(Exchange, Left("fenced"))
    hand.answer(Leave, NOTHING)
    hand.command(Fence(Epoch(4)))
    hand.answer(Leave, NOTHING)
    hand.command(configure(SWITCHED.at(Epoch(4))))
    assert hand.wants == GiveUpAttention(2)
    hand.slots.resize(2)
    hand.answer(GiveUpAttention)
    hand.answer(Load, QUICKLY)
    hand.answer(Enter, 0.0)
    assert hand.wants == Reach("schedule")


# ---- the end, and drivers that are wrong ----------------------------------------------------


def test_stop_ends_the_loop_and_what_comes_behind_it_is_not_handled() -> None:
    hand = stepping()
    hand.step()
    hand.command(Stop(), add(seq_id=1), Fence(Epoch(2)))
    assert hand.wants is None
    assert SeqId(1) not in hand.rank.queues.live
    assert hand.names() == ["Resumed", "Tokens"]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Commands, None),
        (Commands, (Stop(),)),
        (Load, None),
        (Load, (0.0, 0, {})),
        (Enter, None),
        (Exchange, ()),
        (Forward, []),
        (Leave, None),
        (Leave, Place(0, "experts", True)),
    ],
)
def test_an_answer_of_the_wrong_kind_is_the_drivers_fault(
    kind: type[Effect], answer: object
) -> None:
    hand = Hand()
    for _ in range(20):
        if isinstance(hand.wants, kind):
            break
        match hand.wants:
            case Commands(wait=True):
                hand.command(configure(), add())
            case Commands():
                hand.command(Fence(Epoch(2)))
            case Load():
                hand.answer(Load, QUICKLY)
            case Enter():
                hand.answer(Enter, 0.0)
            case Exchange(header):
                hand.answer(Exchange, [header])
            case Forward(batch):
                hand.answer(Forward, ran(batch))
            case Reach():
                hand.answer(Reach)
    with pytest.raises(AssertionError, match="instead of"):
        hand.answer(kind, answer)


def test_an_injected_fault_is_the_drivers_own_affair() -> None:
    with pytest.raises(AssertionError, match="a driver keeps injected faults to itself"):
        Hand().command(Inject("1", "kill"))


# ---- two of them ----------------------------------------------------------------------------


def meet(*hands: Hand) -> None:
    """One exchange of real headers, and the step they agree on."""
    headers = [hand.to_exchange() for hand in hands]
    for hand in hands:
        hand.answer(Exchange, headers)
        if isinstance(hand.wants, Reach):
            hand.answer(Reach)
            assert isinstance(hand.wants, Forward)
            hand.answer(Forward, ran(hand.wants.batch))
            hand.answer(Reach)
        hand.command()


def test_two_ranks_come_to_the_same_end() -> None:
    """One has a sequence and a fence cuts the other's step: both go on at the same number."""
    both = first, second = Hand(0), Hand(1)
    first.enter(configure(PAIR), add())
    second.enter(configure(PAIR))
    meet(*both)
    headers = [hand.to_exchange() for hand in both]
    first.throw(Exchange, Left("fenced"))
    first.answer(Leave, NOTHING)
    second.answer(Exchange, headers)
    second.answer(Reach)
    second.throw(Forward, Broken("rank 0 has left"))
    second.answer(Leave, NOTHING)
    for hand in both:
        hand.command(Fence(Epoch(2)))
        hand.answer(Leave, NOTHING)
    acks = [hand.told[-1] for hand in both]
    assert [a.next_step for a in acks if isinstance(a, FenceAck)] == [1, 1]
    for hand in both:
        hand.enter(configure(PAIR.at(Epoch(2)), step=1, wake=1))
    for _ in range(4):
        meet(*both)
    said = [t.position for r in first.told if isinstance(r, Tokens) for t in r.tokens]
    assert said == [0, 1, 2, 3], "each once, in order"
    assert all(isinstance(hand.rank.state, Parked) for hand in both)
    for hand in both:
        hand.rank.check_invariants()
