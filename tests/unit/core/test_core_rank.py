"""The step state machine: agreement, park and wake, commit, roll back, fence, configure."""

import time

import pytest
from core_harness import Solo, limits, next_token, result_of, snapshot, spec

from revivemoe.core.agreement import Disagreement, agree
from revivemoe.core.rank import Rank
from revivemoe.core.state import Fenced, InDomain, Parked, Unconfigured
from revivemoe.core.step import Park, Retry, Run, StepHeader, StepResult
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.tokens import CommittedToken


def header(num_tokens: int = 0, has_work: int = 0, wake: int = 0, step: int = 3) -> StepHeader:
    return StepHeader(epoch=1, step=step, num_tokens=num_tokens, has_work=has_work, wake=wake)


def new_rank(rank_id: int = 0, **changes: int) -> Rank:
    return Rank(RankId(rank_id), Incarnation(1), limits(**changes))


@pytest.mark.parametrize(
    ("headers", "agreement"),
    [
        ([header(5, 1), header()], Run(tokens_per_member=(5, 0))),
        ([header(), header(1, 1, wake=4)], Run(tokens_per_member=(0, 1))),
        ([header(wake=2), header(wake=2)], Park()),
        ([header(wake=2), header(wake=3)], Retry()),
        ([header(), header(has_work=1)], Retry()),
    ],
)
def test_agreement(headers: list[StepHeader], agreement: object):
    assert agree(headers) == agreement


def test_members_at_different_steps_disagree():
    with pytest.raises(Disagreement, match="0: epoch 1 step 3, 1: epoch 1 step 4"):
        agree([header(), header(step=4)])


# ---- park and wake --------------------------------------------------------------------------


def test_an_idle_rank_parks_without_using_up_a_step_number():
    solo = Solo().enter()
    assert solo.step() is None
    assert solo.rank.state == Parked(Epoch(1), 0, b"", wake=0)
    assert solo.rank.stats().parked
    solo.rank.wake(0)
    assert isinstance(solo.rank.state, Parked)
    solo.rank.wake(1)
    assert solo.rank.state == InDomain(Epoch(1), 0, b"")


def test_a_wake_between_header_and_agreement_is_not_lost():
    rank = Solo().enter().rank
    rank.begin_step()
    sent = rank.header()
    rank.wake(5)
    assert rank.agree([sent]) == Park()
    assert isinstance(rank.state, InDomain)


def test_differing_wakes_are_agreed_on_again_until_equal():
    rank = Solo().enter().rank
    rank.begin_step()
    assert rank.agree([rank.header(), rank.header()._replace(wake=1)]) == Retry()
    rank.wake(1)
    rank.begin_step()
    assert rank.agree([rank.header(), rank.header()]) == Park()


def test_a_sequence_that_comes_to_a_parked_rank_waits_for_the_wake():
    solo = Solo().enter()
    solo.step()
    solo.rank.add(spec(0, [1]))
    assert isinstance(solo.rank.state, Parked)
    solo.log[0], solo.logprobs[0] = [], []
    solo.wake()
    solo.drain()
    assert len(solo.log[0]) == 4


# ---- commit ---------------------------------------------------------------------------------


def test_commit_reports_tokens_and_drops_what_is_finished():
    solo = Solo().enter()
    solo.add(spec(7, [1, 2], max_tokens=1))
    tokens = solo.step()
    assert tokens is not None
    assert (tokens.rank, tokens.incarnation, tokens.epoch, tokens.step) == (0, 1, 1, 0)
    assert tokens.tokens == [CommittedToken(seq_id=7, position=0, token_id=next_token([1, 2]))]
    assert not solo.rank.queues.live
    assert solo.rank.pool.num_free == 16
    assert solo.rank.state == InDomain(Epoch(1), 1, b"")


def test_a_stop_token_ends_a_sequence():
    solo = Solo().enter()
    stop = next_token([1, 2])
    solo.add(spec(0, [1, 2], max_tokens=9, stop_token_ids=(stop,)))
    solo.drain()
    assert solo.log[0] == [stop]


def test_an_idle_member_commits_nothing_and_keeps_step_with_the_others():
    rank = Solo().enter().rank
    assert rank.begin_step().items == ()
    assert rank.agree([rank.header(), header(4, 1)._replace(step=0)]) == Run((0, 4))
    assert rank.commit([], step_s=0.5).step_s == 0.5
    assert rank.state == InDomain(Epoch(1), 1, b"")


def test_an_expert_only_rank_needs_no_blocks():
    rank = new_rank(num_blocks=0)
    rank.configure(Epoch(1), 0, b"", 0)
    assert rank.begin_step().items == ()
    rank.check_invariants()


@pytest.mark.parametrize("results", [[], [StepResult(None)], [StepResult(1)] * 2])
def test_a_commit_that_fails_has_changed_nothing(results: list[StepResult]):
    solo = Solo().enter()
    before = snapshot(solo.rank)
    solo.rank.add(spec(0, [1, 2, 3, 4, 1]))
    before = snapshot(solo.rank)
    solo.rank.begin_step()
    solo.rank.mark_executing()
    with pytest.raises(AssertionError):
        solo.rank.commit(results)
    solo.rank.roll_back()
    assert snapshot(solo.rank) == before


def test_prompt_logprobs_come_once_each_in_chunks():
    solo = Solo(limits(max_num_batched_tokens=5)).enter()
    solo.add(spec(0, [1, 2, 3, 4, 1, 2, 3], prompt_logprobs=1))
    tokens = solo.step()
    assert tokens is not None
    assert [(p.start, len(p.entries)) for p in tokens.prompt_logprobs] == [(1, 5)]
    solo.cut_step(written=2)
    tokens = solo.step()
    assert tokens is not None
    assert [(p.start, len(p.entries)) for p in tokens.prompt_logprobs] == [(6, 1)]


# ---- requests -------------------------------------------------------------------------------


def test_sequences_come_and_go_in_every_state_but_not_within_a_step():
    rank = new_rank()
    rank.add(spec(0, [1]))
    rank.fence(Epoch(1))
    rank.add(spec(1, [1]))
    rank.abort(spec(0, [1]).seq_id)
    rank.configure(Epoch(1), 0, b"", 0)
    rank.begin_step()
    for change in (lambda: rank.add(spec(2, [1])), lambda: rank.abort(spec(1, [1]).seq_id)):
        with pytest.raises(AssertionError, match="between steps"):
            change()
    assert list(rank.queues.live) == [1]


def test_a_sequence_that_can_never_run_is_refused():
    rank = new_rank(num_blocks=2)
    rank.add(spec(0, [1] * 8, max_tokens=1))
    with pytest.raises(AssertionError, match="3 blocks of 2"):
        rank.add(spec(1, [1] * 8, max_tokens=2))
    with pytest.raises(AssertionError, match="finished"):
        rank.add(spec(2, [1], output=[1], max_tokens=1))


# ---- epochs ---------------------------------------------------------------------------------


def test_a_fence_rolls_back_and_tells_what_is_held():
    solo = Solo().enter()
    solo.add(spec(3, [1, 2]))
    solo.step()
    solo.add(spec(4, [1, 2]))
    solo.rank.begin_step()
    solo.rank.mark_executing()
    ack = solo.rank.fence(Epoch(2))
    assert ack is not None
    assert (ack.epoch, ack.next_step, ack.rolled_back) == (2, 1, True)
    assert ack.num_output == {3: 1, 4: 0}
    again = solo.rank.fence(Epoch(2))
    assert again is not None
    assert (again.next_step, again.num_output, again.rolled_back) == (1, ack.num_output, False)
    solo.check()


def test_stale_fences_and_configures_are_ignored():
    rank = new_rank()
    assert rank.fence(Epoch(3)) is not None
    assert not rank.configure(Epoch(2), 0, b"", 0)
    assert rank.state == Fenced(Epoch(3), 0)
    assert rank.configure(Epoch(3), 5, b"", 0)
    assert not rank.configure(Epoch(3), 9, b"", 0)
    assert rank.fence(Epoch(3)) is None
    assert rank.state == InDomain(Epoch(3), 5, b"")
    assert rank.fence(Epoch(5)) is not None
    assert rank.fence(Epoch(4)) is None
    assert rank.state == Fenced(Epoch(5), 5)


def test_a_parked_rank_is_fenced_and_its_epoch_is_over():
    solo = Solo().enter()
    solo.step()
    assert solo.rank.fence(Epoch(1)) is None
    assert solo.rank.fence(Epoch(2)) is not None
    solo.rank.wake(9)
    assert isinstance(solo.rank.state, Fenced)
    with pytest.raises(AssertionError, match="no step can begin"):
        solo.rank.begin_step()


def test_no_epoch_is_entered_past_a_fence():
    rank = new_rank()
    assert rank.state == Unconfigured()
    assert rank.configure(Epoch(1), 0, b"", 0)
    with pytest.raises(AssertionError, match="begins with a fence"):
        rank.configure(Epoch(2), 0, b"", 0)


def test_survivors_keep_their_kv_over_a_fence():
    solo = Solo().enter()
    solo.add(spec(0, [1, 2, 3, 4, 1], max_tokens=6))
    solo.step()
    solo.enter()
    batch = solo.rank.begin_step()
    assert [(item.start, item.count) for item in batch.items] == [(5, 1)]
    solo.rank.roll_back()
    solo.drain()
    assert solo.rank.stats().survivor_refills == 0


def test_computing_again_what_a_survivor_held_is_counted():
    solo = Solo(limits(enable_prefix_caching=False)).enter()
    solo.add(spec(0, [1, 2, 3, 4, 1], max_tokens=6))
    solo.step()
    solo.enter()
    solo.rank.abort(spec(0, [1]).seq_id)
    solo.add(spec(0, [1, 2, 3, 4, 1], max_tokens=6, output=solo.log[0]))
    solo.drain()
    assert solo.rank.stats().survivor_refills == 5


# ---- two ranks ------------------------------------------------------------------------------


def test_a_survivor_one_step_behind_goes_on_at_the_maximum():
    ranks = [new_rank(0), new_rank(1)]
    for rank in ranks:
        rank.configure(Epoch(1), 0, b"", 0)
        rank.add(spec(rank.rank_id, [1, 2]))
    _begin_and_agree(ranks)
    ranks[0].commit([result_of(item) for item in _items(ranks[0])])
    acks = [rank.fence(Epoch(2)) for rank in ranks]
    assert [ack.next_step for ack in acks if ack] == [1, 0]
    for rank in ranks:
        assert rank.configure(Epoch(2), 1, b"", 0)
    _begin_and_agree(ranks)
    tokens = [rank.commit([result_of(item) for item in _items(rank)]) for rank in ranks]
    assert [t.tokens[0].position for t in tokens] == [1, 0]


def _items(rank: Rank):
    assert isinstance(rank.state, InDomain)
    assert rank.state.open is not None
    return rank.state.open.batch.items


def _begin_and_agree(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.begin_step()
    headers = [rank.header() for rank in ranks]
    for rank in ranks:
        assert isinstance(rank.agree(headers), Run)
        rank.mark_executing()


def test_a_decode_step_costs_little():
    """16 sequences of about 1000 tokens. The bound is loose: it catches what grows with history."""
    rank = new_rank(
        num_blocks=2048, block_size=16, max_num_seqs=16, max_num_batched_tokens=2**15,
        max_model_len=4096,
    )  # fmt: skip
    rank.configure(Epoch(1), 0, b"", 0)
    for seq_id in range(16):
        rank.add(spec(seq_id, [1 + seq_id] * 1000, max_tokens=500))
    took: list[float] = []
    for _ in range(60):
        began = time.perf_counter()
        batch = rank.begin_step()
        rank.mark_executing()
        scheduled = time.perf_counter() - began
        results = [StepResult(token_id=1) for _ in batch.items]
        began = time.perf_counter()
        rank.commit(results)
        took.append(scheduled + time.perf_counter() - began)
    print(f"median {sorted(took)[30] * 1e3:.3f} ms")
    assert sorted(took)[30] < 3e-3
