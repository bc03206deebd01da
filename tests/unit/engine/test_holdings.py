"""What a rank says it holds, against what it ought to hold: no stream waits for ever."""

from itertools import pairwise
from random import Random

import pytest
from unit.control_plane import Instance, Sink, answer

from revivemoe.engine.holdings import ANSWER_S, DIFFERS_S, MAX_QUESTIONS, Holdings
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.messages.commands import Abort, Add, Command, Fence, TellHoldings, Wake
from revivemoe.messages.reports import Heartbeat, RankStats, Tokens
from revivemoe.messages.reports import Holdings as Told
from revivemoe.messages.tally import Tally

A, B = (RankId(0), Incarnation(1)), (RankId(1), Incarnation(3))
ONE, TWO = SeqId(1), SeqId(2)

# ---- the books ------------------------------------------------------------------------------


def test_the_tally_is_that_of_what_is_held() -> None:
    """After any changes, in any order; nothing is left of those that are gone."""
    draw, holdings = Random(0), Holdings()
    held: dict[SeqId, tuple[tuple[RankId, Incarnation], int]] = {}
    for _ in range(2000):
        seq_id, owner = SeqId(draw.randrange(12)), draw.choice([A, B])
        match draw.choice(["hand over", "grow", "drop", "lose"]):
            case "hand over":
                held[seq_id] = (owner, draw.randrange(5))
                holdings.hand_over(seq_id, *held[seq_id])
            case "grow" if seq_id in held:
                held[seq_id] = (held[seq_id][0], held[seq_id][1] + draw.randrange(3))
                holdings.grow(seq_id, held[seq_id][1])
            case "drop":
                held.pop(seq_id, None)
                holdings.drop(seq_id)
            case "lose" if draw.random() < 0.1:
                held = {s: at for s, at in held.items() if at[0] != owner}
                holdings.lose(owner[0])
        for each in (A, B):
            tally = Tally()
            for s, (of, num_output) in held.items():
                tally = tally.plus(s, num_output) if of == each else tally
            assert holdings.tally(each) == tally
    holdings.lose(A[0])
    holdings.lose(B[0])
    assert (holdings._held, holdings._tallies) == ({}, {})


def asked(holdings: Holdings, now: float) -> int | None:
    """A heartbeat of a rank that holds nothing."""
    return holdings.doubtful(A, Tally(), now)


def test_a_rank_is_asked_when_it_has_differed_for_a_while() -> None:
    holdings = Holdings()
    holdings.hand_over(ONE, A, 0)
    assert asked(holdings, 10.0) is None
    assert asked(holdings, 10.9) is None
    assert holdings.doubtful(A, holdings.tally(A), 10.95) is None, "it agrees"
    assert asked(holdings, 11.0) is None, "from the beginning"
    assert asked(holdings, 11.0 + DIFFERS_S) == 1
    assert asked(holdings, 12.5) is None, "one question at a time"


def test_questions_without_an_answer_come_to_an_end() -> None:
    holdings = Holdings()
    holdings.hand_over(ONE, A, 0)
    questions = [asked(holdings, 10.0 + 0.25 * beat) for beat in range(400)]
    numbers = [number for number in questions if number is not None]
    assert numbers == list(range(1, MAX_QUESTIONS + 1))
    at = [10.0 + 0.25 * beat for beat, number in enumerate(questions) if number is not None]
    assert all(b - a == ANSWER_S for a, b in pairwise(at))
    assert not holdings.answers(A, MAX_QUESTIONS - 1), "an earlier one"
    assert holdings.answers(A, MAX_QUESTIONS)
    assert not holdings.answers(A, MAX_QUESTIONS), "once"


def test_an_answer_says_nothing_of_what_came_behind_the_question() -> None:
    holdings = Holdings()
    holdings.hand_over(ONE, A, 0)
    asked(holdings, 10.0)
    request = asked(holdings, 11.0)
    holdings.hand_over(TWO, A, 4)
    assert holdings.differences(A, {}, request) == ([ONE], [])
    assert holdings.differences(A, {ONE: 0}, request) == ([], [])
    assert holdings.differences(A, {ONE: 1, TWO: 3}, request) == ([ONE], [])
    holdings.hand_over(ONE, A, 0)
    assert holdings.differences(A, {}, request) == ([], []), "afresh"
    assert holdings.differences(A, {}) == ([TWO, ONE], []), "with a fence"


def test_what_a_rank_should_not_hold() -> None:
    holdings = Holdings()
    holdings.hand_over(ONE, B, 0)
    assert holdings.differences(A, {ONE: 0, TWO: 7}) == ([], [ONE, TWO])


# ---- an instance ----------------------------------------------------------------------------


def serving() -> Instance:
    return Instance(2).start()


def live(instance: Instance, seconds: float) -> None:
    """Heartbeats and steps."""
    for _ in range(round(seconds * 10)):
        instance.wait(0.1)
        instance.step()


def lose_tokens(instance: Instance) -> None:
    """A step whose tokens never arrive."""
    instance.step(deliver=False)
    reports = instance.cluster.reports
    for report in [r for r in reports if isinstance(r, Tokens)]:
        reports.remove(report)


@pytest.mark.parametrize("at", [0, 2], ids=["only", "last"])
def test_a_stream_whose_last_token_was_lost_ends_right(at: int) -> None:
    instance = serving()
    sink = instance.submit((1, 2, 3), max_tokens=at + 1)
    instance.step(at)
    lose_tokens(instance)
    assert not any(fake.live for fake in instance.cluster.ranks.values()), "none goes on"
    live(instance, 2.5)
    assert sink.token_ids() == answer((1, 2, 3), at + 1)
    assert sink.ended == 1
    assert instance.named("holdings_mended") == [{"event": "holdings_mended", "id": 0, "count": 1}]
    assert instance.engine.traffic.totals.mended == 1
    assert len(instance.cluster.commands(TellHoldings)) == 1
    assert not instance.cluster.commands(Fence)


def test_the_domain_is_woken_for_what_is_mended() -> None:
    instance = serving()
    instance.submit(max_tokens=1)
    lose_tokens(instance)
    instance.cluster.sent.clear()
    instance.wait(2.0)
    kinds = [type(command).__name__ for _, command in instance.cluster.sent]
    assert kinds == ["TellHoldings", "Abort", "Add", "Wake", "Wake"]


def test_a_copy_whose_token_was_lost_is_not_waited_for() -> None:
    instance = serving()
    instance.submit(max_tokens=100)
    shadow = instance.engine.traffic.ledger.warm(SeqId(0), RankId(1))
    instance.step(deliver=False)
    reports = instance.cluster.reports
    for report in [r for r in reports if isinstance(r, Tokens) and r.rank == 1]:
        reports.remove(report)
    live(instance, 2.5)
    assert not instance.engine.traffic.ledger.warming(shadow)
    assert not instance.cluster.commands(Fence)


def test_what_a_rank_goes_on_with_though_nobody_wants_it_is_ended() -> None:
    """An abort that was lost."""
    instance = serving()
    sink, request = instance.submit_request(max_tokens=100)
    instance.step(2)
    fake = instance.cluster.ranks[RankId(0)]
    kept = dict(fake.live)
    instance.engine.abort(request)
    fake.live.update(kept)
    live(instance, 2.5)
    assert not fake.live
    assert sink.ended == 1
    assert not instance.named("holdings_mended"), "no stream was missing anything"


class Slow:
    """Commands that take until the next heartbeat but one."""

    def __init__(self, instance: Instance) -> None:
        self._send = instance.cluster.send
        self._near, self._far = list[tuple[RankId, Command]](), list[tuple[RankId, Command]]()
        instance.cluster.send = self._take  # type: ignore[method-assign]

    def _take(self, rank: RankId, command: Command) -> None:
        self._far.append((rank, command))

    def arrive(self) -> None:
        arriving, self._near, self._far = self._near, self._far, []
        for rank, command in arriving:
            self._send(rank, command)


def test_nothing_is_mended_while_requests_are_on_their_way() -> None:
    """In every heartbeat the rank has not yet what the engine has just given to it."""
    instance, sinks = Instance(1, redundant=0).start(), list[Sink]()
    slow = Slow(instance)
    for beat in range(100):
        prompt = (beat % 7, 2)
        sinks.append(instance.submit(prompt, max_tokens=1 + beat % 5))
        instance.wait(0.1)
        slow.arrive()
        instance.step()
    for _ in range(20):
        slow.arrive()
        instance.step()
    assert instance.cluster.commands(TellHoldings), "it never agreed"
    assert not instance.named("holdings_mended")
    assert not instance.cluster.commands(Abort)
    assert len(instance.cluster.commands(Add)) == 100, "each once"
    for beat, sink in enumerate(sinks):
        assert sink.token_ids() == answer((beat % 7, 2), 1 + beat % 5)
        assert sink.ended == 1


def test_a_rank_that_does_not_tell_is_not_asked() -> None:
    instance = serving()
    instance.submit(max_tokens=1)
    lose_tokens(instance)
    for _ in range(30):
        instance.now += 0.1
        for fake in instance.cluster.ranks.values():
            fake.say(Heartbeat(fake.rank, fake.incarnation, 0, RankStats()))
        instance.deliver()
    assert not instance.cluster.commands(TellHoldings)


def test_an_answer_of_an_epoch_that_is_over_is_dropped() -> None:
    """With a fence the rank has told what it holds; that has been mended already."""
    instance = serving()
    instance.submit(max_tokens=2)
    lose_tokens(instance)
    lose_tokens(instance)
    fake = instance.cluster.ranks[RankId(0)]
    hears = fake.handle
    fake.handle = lambda c: None if isinstance(c, TellHoldings) else hears(c)  # type: ignore
    instance.wait(1.5)
    (question,) = instance.cluster.commands(TellHoldings)
    instance.die(1)
    assert instance.engine.epochs.serving
    added = len(instance.cluster.commands(Add))
    told = Told(fake.rank, fake.incarnation, question.request, {})
    instance.engine.on_report(told, instance.now)
    assert len(instance.cluster.commands(Add)) == added


def test_whoever_is_given_a_sequence_again_is_woken() -> None:
    """It may have parked: its other sequences ended with the step whose tokens were lost."""
    instance = Instance(2, redundant=8).start()
    sink = instance.submit((1, 2), max_tokens=6)
    (rank,) = (r for r, fake in instance.cluster.ranks.items() if fake.live)
    instance.cluster.ranks[rank].run_step()
    instance.cluster.reports.clear()
    instance.cluster.ranks[rank].run_step()
    instance.cluster.sent.clear()
    instance.deliver()
    kinds = [type(command) for _, command in instance.cluster.sent]
    assert Add in kinds
    assert Wake in kinds[kinds.index(Add) :]
    instance.step(8)
    assert sink.token_ids() == answer((1, 2), 6)
