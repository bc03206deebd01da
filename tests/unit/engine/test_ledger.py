import pytest
from unit.control_plane import TOKENIZER, VOCABULARY, Sink, submission

from revivemoe.engine.ledger import Ledger
from revivemoe.engine.requests import LiveRequest
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.messages.commands import Abort, Add, Command
from revivemoe.messages.reports import Tokens
from revivemoe.messages.tokens import CommittedToken, PromptLogprobs, SequenceSpec, TokenLogprobs
from revivemoe.streams import PromptLogprobsReady, Submission

A, B, C = RankId(0), RankId(1), RankId(2)
LOGPROBS = TokenLogprobs(-1.0, [(7, -1.0)])


class Books:
    """A ledger and what it sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[RankId, Command]] = []
        self.incarnations: dict[RankId, Incarnation] = {}
        self.ledger = Ledger(
            VOCABULARY,
            64,
            lambda rank, command: self.sent.append((rank, command)),
            lambda rank: self.incarnations.get(rank, Incarnation(1)),
        )

    def admit(self, asked: Submission, degraded: bool = False) -> tuple[Sink, LiveRequest]:
        sink = Sink()
        return sink, self.ledger.admit(asked, sink, degraded)

    def running(self, asked: Submission | None = None, ranks: tuple[RankId, ...] = (A,)) -> Sink:
        """One request that the ranks have taken up, with nothing noted of it."""
        sink, _ = self.admit(asked or submission())
        self.ledger.assign_waiting(ranks)
        self.sent.clear()
        return sink

    def report(self, rank: RankId, *tokens: tuple[int, int, int], incarnation: int = 1) -> int:
        """(sequence, position, token id); returns how many were new."""
        committed = [CommittedToken(SeqId(s), p, t) for s, p, t in tokens]
        arrival = self.ledger.on_tokens(
            Tokens(rank, Incarnation(incarnation), epoch=1, step=0, tokens=committed)
        )
        return arrival.new_tokens

    def added(self) -> list[tuple[RankId, SequenceSpec]]:
        return [(rank, c.sequence) for rank, c in self.sent if isinstance(c, Add)]

    def aborted(self) -> list[tuple[RankId, int]]:
        return [(rank, c.seq_id) for rank, c in self.sent if isinstance(c, Abort)]


@pytest.fixture
def books() -> Books:
    return Books()


# ---- routing --------------------------------------------------------------------------------


def test_the_oldest_goes_first_to_the_rank_with_the_fewest_tokens(books: Books) -> None:
    for length in (10, 2, 3, 4):
        books.admit(submission(tuple(range(length))))
    assert len(books.ledger.assign_waiting([A, B])) == 4
    assert [(rank, spec.seq_id) for rank, spec in books.added()] == [(A, 0), (B, 1), (B, 2), (B, 3)]


def test_output_counts_as_load(books: Books) -> None:
    books.running(submission((1, 2)), (A, B))
    books.report(A, (0, 0, 5), (0, 1, 5), (0, 2, 5))
    books.running(submission((1, 2, 3)), (A, B))
    books.admit(submission((1,)))
    books.ledger.assign_waiting([A, B])
    assert books.added()[0][0] == B, "5 tokens on A, 3 on B"


def given(books: Books, *prompts: tuple[int, ...]) -> list[RankId]:
    """Each prompt alone, one after another: the ranks they go to."""
    books.sent.clear()
    for prompt in prompts:
        books.admit(submission(prompt))
        books.ledger.assign_waiting([A, B])
    return [rank for rank, _ in books.added()]


def test_what_begins_alike_goes_where_its_beginning_is_cached(books: Books) -> None:
    common, others = tuple(range(200)), tuple(range(300, 500))
    assert given(books, common, others) == [A, B]
    assert given(books, (*common[:192], 7, 8), (*others[:150], 9)) == [A, B]


def test_but_not_at_any_price(books: Books) -> None:
    """Once it has more to do than a prefill takes elsewhere, the other one comes to know it."""
    common = tuple(range(200))
    assert given(books, *[(*common, n) for n in range(6)]).count(B) >= 2


def test_a_new_process_knows_nothing(books: Books) -> None:
    common = tuple(range(200))
    assert given(books, common, tuple(range(300, 330))) == [A, B]
    books.ledger.orphan(A)
    books.incarnations[A] = Incarnation(2)
    books.ledger.assign_waiting([B])
    assert given(books, (*common, 7)) == [A], "B has more to do, whatever it knows"


def test_ranks_that_are_no_longer_there_get_nothing(books: Books) -> None:
    books.running(submission(tuple(range(30))), (C,))
    books.admit(submission())
    books.ledger.assign_waiting([A])
    assert [rank for rank, _ in books.added()] == [A]


def test_nothing_waits_twice(books: Books) -> None:
    books.running()
    assert not books.ledger.assign_waiting([A, B])
    assert not books.sent


def test_choices_and_prompts_are_sequences_of_their_own(books: Books) -> None:
    asked = submission(prompts=((1, 2), (3, 4, 5)), n=2, prompt_logprobs=1)
    _, request = books.admit(asked)
    books.ledger.assign_waiting([A])
    specs = [spec for _, spec in books.added()]
    assert [tuple(s.prompt_ids) for s in specs] == [(1, 2), (1, 2), (3, 4, 5), (3, 4, 5)]
    assert [s.params.choice for s in specs] == [0, 1, 0, 1]
    assert [s.params.prompt_logprobs for s in specs] == [1, None, 1, None]
    assert {s.arrival for s in specs} == {0}
    assert request.unfinished == {0, 1, 2, 3}


def test_the_requests_of_sequences(books: Books) -> None:
    books.admit(submission(request_id="first", n=2))
    books.admit(submission(request_id="second"))
    assert books.ledger.request_ids(map(SeqId, range(4))) == ["first", "first", "second"]


# ---- tokens ---------------------------------------------------------------------------------


def test_tokens_stream_at_once(books: Books) -> None:
    sink = books.running()
    assert books.report(A, (0, 0, 11)) == 1
    assert books.report(A, (0, 1, 12)) == 1
    assert sink.token_ids() == [11, 12]


def test_what_came_before_is_dropped(books: Books) -> None:
    sink = books.running()
    books.report(A, (0, 0, 11), (0, 1, 12))
    assert books.report(A, (0, 0, 11), (0, 1, 99)) == 0
    assert sink.token_ids() == [11, 12]
    assert not books.sent


def test_only_the_owner_may_report(books: Books) -> None:
    sink = books.running()
    assert books.report(B, (0, 0, 11)) == 0
    assert books.report(A, (0, 0, 11), incarnation=2) == 0
    assert books.report(A, (9, 0, 11)) == 0, "a sequence nobody knows"
    assert sink.events == []


def test_a_former_owner_may_not_report_any_more(books: Books) -> None:
    sink = books.running()
    books.report(A, (0, 0, 11))
    books.ledger.hand_over(SeqId(0), B)
    assert books.report(A, (0, 1, 12)) == 0
    assert books.report(B, (0, 1, 13)) == 1
    assert sink.token_ids() == [11, 13]


def test_a_gap_is_filled_by_handing_the_sequence_over_afresh(books: Books) -> None:
    sink = books.running()
    books.report(A, (0, 0, 11))
    assert books.report(A, (0, 2, 13)) == 0
    assert books.ledger.gaps == 1
    assert books.aborted() == [(A, 0)]
    ((rank, spec),) = books.added()
    assert (rank, spec.output_ids, spec.prompt_ids) == (A, [11], [1, 2, 3])
    assert isinstance(books.sent[0][1], Abort), "the rank would ignore an Add of what it holds"
    assert books.report(A, (0, 1, 12), (0, 2, 13)) == 2
    assert sink.token_ids() == [11, 12, 13]


def test_one_bad_sequence_does_not_hold_up_the_others(books: Books) -> None:
    first = books.running()
    second = books.running()
    assert books.report(A, (0, 3, 11), (1, 0, 21)) == 1
    assert (first.token_ids(), second.token_ids()) == ([], [21])


def test_the_last_token_ends_the_stream(books: Books) -> None:
    sink = books.running(submission(max_tokens=2))
    report = Tokens(
        A, Incarnation(1), 1, 0, [CommittedToken(SeqId(0), p, 11 + p) for p in range(3)]
    )
    arrival = books.ledger.on_tokens(report)
    assert (arrival.new_tokens, arrival.first_tokens, arrival.finished) == (2, 1, ("length",))
    assert sink.deltas()[-1].finish_reason == "length"
    assert sink.ended == 1
    assert books.ledger.num_unfinished == 0
    assert not books.sent, "the rank counts for itself"


def test_a_request_ends_with_its_last_choice(books: Books) -> None:
    sink = books.running(submission(n=2, max_tokens=1))
    books.report(A, (1, 0, 11))
    assert not sink.ended
    books.report(A, (0, 0, 11))
    assert sink.ended == 1


def test_a_stop_string_ends_it_on_the_rank_too(books: Books) -> None:
    sink = books.running(submission(stop=("world",)))
    ids = TOKENIZER.encode("hello world and")
    for position, token in enumerate(ids):
        books.report(A, (0, position, token))
    last = sink.deltas()[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "world")
    assert "".join(d.text for d in sink.deltas()) == "hello "
    assert books.aborted() == [(A, 0)]
    assert sink.ended == 1
    assert len(sink.token_ids()) < len(ids), "what was generated beyond the end is discarded"


def test_a_stop_token_needs_no_abort(books: Books) -> None:
    sink = books.running(submission(stop_token_ids=(11,)))
    books.report(A, (0, 0, 11))
    assert (sink.deltas()[-1].finish_reason, sink.deltas()[-1].stop_reason) == ("stop", 11)
    assert not books.sent


# ---- prompt log-probabilities ---------------------------------------------------------------


def scores(books: Books, rank: RankId, start: int, count: int) -> None:
    part = PromptLogprobs(SeqId(0), start, [LOGPROBS] * count)
    books.ledger.on_tokens(Tokens(rank, Incarnation(1), 1, 0, [], [part]))


def test_prompt_logprobs_come_once_and_whole(books: Books) -> None:
    sink = books.running(submission((1, 2, 3, 4), prompt_logprobs=1))
    scores(books, A, 1, 2)
    assert sink.events == []
    scores(books, B, 3, 1)
    scores(books, A, 1, 2)
    assert sink.events == []
    scores(books, A, 3, 1)
    scores(books, A, 3, 1)
    assert sink.events == [PromptLogprobsReady(0, (LOGPROBS,) * 3)]


def test_sibling_choices_wait_for_the_prompts_logprobs(books: Books) -> None:
    """The server writes them before a choice's first token, so they have to come first."""
    sink = books.running(submission((1, 2, 3), n=2, prompt_logprobs=1, max_tokens=2))
    books.report(A, (1, 0, 11), (1, 1, 12))
    assert sink.events == []
    assert not sink.ended
    scores(books, A, 1, 2)
    assert sink.events[0] == PromptLogprobsReady(0, (LOGPROBS,) * 2)
    assert [(d.index, d.token_ids) for d in sink.deltas(1)] == [(1, (11,)), (1, (12,))]
    books.report(A, (0, 0, 11), (0, 1, 12))
    assert sink.ended == 1


def test_a_prompt_of_one_token_has_no_logprobs_to_wait_for(books: Books) -> None:
    sink = books.running(submission((1,), n=2, prompt_logprobs=1))
    books.report(A, (1, 0, 11))
    assert sink.token_ids(1) == [11]


def test_a_migrated_prompt_goes_on_where_it_was(books: Books) -> None:
    books.running(submission((1, 2, 3, 4), prompt_logprobs=1))
    scores(books, A, 1, 2)
    books.ledger.hand_over(SeqId(0), B)
    assert books.added()[0][1].prompt_logprobs_done == 2


def test_a_gap_in_prompt_logprobs_is_mended(books: Books) -> None:
    books.running(submission((1, 2, 3, 4), prompt_logprobs=1))
    scores(books, A, 3, 1)
    assert books.ledger.gaps == 1
    assert books.added()[0][1].prompt_logprobs_done == 0


# ---- ends -----------------------------------------------------------------------------------


def test_abort_forgets_whatever_is_unfinished(books: Books) -> None:
    sink, request = books.admit(submission(n=3, max_tokens=1))
    books.ledger.assign_waiting([A, B])
    books.sent.clear()
    books.report(A, (0, 0, 11))
    books.ledger.abort(request)
    books.ledger.abort(request)
    assert sorted(books.aborted()) == [(A, 2), (B, 1)]
    assert books.ledger.num_unfinished == 0
    assert sink.ended == 1
    assert books.report(B, (1, 0, 11)) == 0


def test_abort_before_any_rank_took_it(books: Books) -> None:
    sink, request = books.admit(submission())
    books.ledger.abort(request)
    assert not books.sent
    assert sink.ended == 1
    assert not books.ledger.assign_waiting([A])


def test_failing_ends_every_stream_with_an_error(books: Books) -> None:
    sinks = [books.running(submission(n=2)), books.admit(submission())[0]]
    assert books.ledger.fail_all("no rank is left", 503) == 2
    for sink in sinks:
        assert sink.failure is not None
        assert (sink.failure.message, sink.failure.status) == ("no rank is left", 503)
        assert sink.ended == 1
    assert books.ledger.num_unfinished == 0


def test_degraded_from_here_on(books: Books) -> None:
    before = books.running()
    books.report(A, (0, 0, 11))
    books.ledger.mark_degraded()
    books.report(A, (0, 1, 12))
    after, _ = books.admit(submission(), degraded=True)
    books.ledger.assign_waiting([A])
    books.report(A, (1, 0, 11))
    assert [d.degraded for d in before.deltas()] == [False, True]
    assert [d.degraded for d in after.deltas()] == [True]


# ---- recovery -------------------------------------------------------------------------------


def test_views_of_the_unfinished(books: Books) -> None:
    books.running(submission((1, 2)))
    books.report(A, (0, 0, 11))
    books.admit(submission((1, 2, 3)))
    views = [(v.seq_id, v.owner, v.num_tokens, v.arrival) for v in books.ledger.unfinished()]
    assert views == [(0, A, 3, 0), (1, None, 3, 1)]


def test_hand_over_is_prompt_and_committed_tokens(books: Books) -> None:
    books.running(submission(temperature=0.5, seed=9))
    books.report(A, (0, 0, 11), (0, 1, 12))
    books.ledger.hand_over(SeqId(0), B)
    assert books.aborted() == [(A, 0)], "a former owner that lives frees it"
    ((rank, spec),) = books.added()
    assert rank == B
    assert (spec.prompt_ids, spec.output_ids, spec.params.seed) == ([1, 2, 3], [11, 12], 9)


def test_survivors_that_agree_are_left_alone(books: Books) -> None:
    books.running()
    books.running(ranks=(B,))
    books.report(A, (0, 0, 11))
    assert books.ledger.reconcile(A, {SeqId(0): 1}) == 0
    assert not books.sent


@pytest.mark.parametrize("held", [{SeqId(0): 0}, {SeqId(0): 2}, {}])
def test_a_survivor_that_differs_gets_the_sequence_afresh(
    books: Books, held: dict[SeqId, int]
) -> None:
    books.running()
    books.report(A, (0, 0, 11))
    assert books.ledger.reconcile(A, held) == 1
    assert books.aborted() == [(A, 0)]
    assert [spec.output_ids for _, spec in books.added()] == [[11]]


def test_a_survivor_frees_what_is_not_its_own(books: Books) -> None:
    """An abort or an end in flight at the fence; or a sequence that another rank has by now."""
    books.running(ranks=(B,))
    assert books.ledger.reconcile(A, {SeqId(0): 1, SeqId(5): 3}) == 0
    assert sorted(books.aborted()) == [(A, 0), (A, 5)]
    assert not books.added()


def test_a_former_incarnation_owns_nothing(books: Books) -> None:
    books.running()
    books.incarnations[A] = Incarnation(2)
    assert books.ledger.reconcile(A, {}) == 0
    books.ledger.hand_over(SeqId(0), A)
    assert not books.aborted(), "the new process has never heard of it"
    assert books.report(A, (0, 0, 11), incarnation=1) == 0
    assert books.report(A, (0, 0, 11), incarnation=2) == 1
