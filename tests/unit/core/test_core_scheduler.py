"""Who runs, who waits, who is preempted. Blocks of four tokens, at most 16 tokens a step."""

import pytest
from core_harness import Solo, limits, spec


def shares(solo: Solo) -> list[tuple[int, int, int]]:
    """(sequence, start, count) of the next batch; the step is then committed."""
    rank = solo.rank
    batch = rank.begin_step()
    rank.roll_back()
    solo.step()
    return [(item.sequence.seq_id, item.start, item.count) for item in batch.items]


def running(solo: Solo) -> list[int]:
    return [sequence.seq_id for sequence in solo.rank.queues.running]


def waiting(solo: Solo) -> list[int]:
    return [sequence.seq_id for sequence in solo.rank.queues.waiting]


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes():
    solo = Solo(limits(num_blocks=32)).enter()
    solo.add(spec(0, [1] * 3, max_tokens=9))
    assert shares(solo) == [(0, 0, 3)]
    solo.add(spec(1, [2] * 40))
    assert shares(solo) == [(0, 3, 1), (1, 0, 15)]
    assert shares(solo) == [(0, 4, 1), (1, 15, 15)]
    assert shares(solo) == [(0, 5, 1), (1, 30, 10)]
    assert shares(solo) == [(0, 6, 1), (1, 40, 1)]


def test_a_young_decode_goes_on_beside_an_older_prefill():
    solo = Solo(limits(num_blocks=32)).enter()
    solo.add(spec(5, [1] * 3, max_tokens=9))
    shares(solo)
    solo.add(spec(6, [2] * 40, arrival=1))
    shares(solo)
    assert shares(solo) == [(6, 15, 15), (5, 4, 1)]


def test_prefills_are_served_by_arrival():
    solo = Solo(limits(num_blocks=32, enable_prefix_caching=False)).enter()
    solo.add(spec(0, [1] * 20, arrival=7))
    solo.add(spec(1, [2] * 20, arrival=3))
    assert shares(solo) == [(1, 0, 16)]
    assert shares(solo) == [(1, 16, 4), (0, 0, 12)]


def test_the_youngest_is_preempted_and_finishes_later():
    solo = Solo(limits(num_blocks=4, block_size=2, max_model_len=9)).enter()
    solo.add(spec(0, [1, 2, 3], max_tokens=5))
    solo.add(spec(1, [4, 4, 4], max_tokens=5))
    shares(solo)
    assert running(solo) == [0, 1]
    shares(solo)
    shares(solo)
    assert (running(solo), waiting(solo)) == ([0], [1])
    assert solo.rank.stats().preemptions == 1
    solo.drain()
    assert [len(solo.log[i]) for i in (0, 1)] == [5, 5]


def test_a_sequence_preempts_itself_rather_than_an_older_one():
    solo = Solo(limits(num_blocks=5, block_size=2, max_model_len=9)).enter()
    solo.add(spec(0, [1], max_tokens=5))
    solo.add(spec(1, [4, 4, 4, 4, 4], max_tokens=4))
    assert shares(solo) == [(0, 0, 1), (1, 0, 5)]
    assert shares(solo) == [(0, 1, 1), (1, 5, 1)]
    assert shares(solo) == [(0, 2, 1)]
    assert (running(solo), waiting(solo)) == ([0], [1])
    solo.drain()
    assert [len(solo.log[i]) for i in (0, 1)] == [5, 4]


def test_nobody_overtakes_the_oldest_waiting_sequence():
    solo = Solo(limits(num_blocks=6, block_size=2, max_model_len=12)).enter()
    solo.add(spec(0, [1] * 6, max_tokens=4))
    shares(solo)
    solo.add(spec(1, [2] * 9, max_tokens=2))
    solo.add(spec(2, [3]))
    shares(solo)
    assert (running(solo), waiting(solo)) == ([0], [1, 2])


def test_a_sequence_is_admitted_only_with_room_for_all_its_history():
    solo = Solo(limits(num_blocks=8)).enter()
    solo.add(spec(0, [1] * 7, max_tokens=9))
    shares(solo)
    solo.add(spec(1, [2] * 25, max_tokens=2))
    assert shares(solo) == [(0, 7, 1)]
    assert waiting(solo) == [1]
    solo.rank.abort(spec(0, [1]).seq_id)
    assert shares(solo) == [(1, 0, 16)]


def test_an_older_waiting_sequence_may_take_the_place_of_a_preempted_one():
    solo = Solo(limits(num_blocks=5, block_size=2, max_model_len=9)).enter()
    solo.add(spec(3, [1], max_tokens=5, arrival=0))
    solo.add(spec(4, [4, 4, 4, 4, 4], max_tokens=4))
    shares(solo)
    shares(solo)
    solo.add(spec(5, [2, 2, 2], max_tokens=2, arrival=1))
    assert shares(solo) == [(3, 2, 1), (5, 0, 3)]
    assert waiting(solo) == [4]


def test_no_more_sequences_run_than_allowed():
    solo = Solo(limits(max_num_seqs=2)).enter()
    for seq_id in range(3):
        solo.add(spec(seq_id, [seq_id + 1]))
    shares(solo)
    assert (running(solo), waiting(solo)) == ([0, 1], [2])


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is():
    solo = Solo().enter()
    prompt = [1, 2, 3, 4, 1, 2, 3, 4]
    solo.add(spec(0, prompt))
    shares(solo)
    solo.add(spec(1, prompt))
    solo.add(spec(2, [*prompt, 3]))
    assert shares(solo)[1:] == [(1, 4, 4), (2, 8, 1)]
    assert solo.rank.stats().prefix_hit_tokens == 12
    assert solo.rank.stats().prefilled_tokens == 8 + 4 + 1


@pytest.mark.parametrize(("done", "start"), [(0, 0), (5, 4), (7, 4), (8, 8)])
def test_owed_prompt_logprobs_are_computed_in_spite_of_the_cache(done: int, start: int):
    solo = Solo().enter()
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 2]
    solo.add(spec(0, prompt))
    solo.step()
    solo.add(spec(1, prompt, prompt_logprobs=1, logprobs_done=done))
    solo.logprobs[1] = [None] * done  # type: ignore[list-item]
    assert shares(solo)[1] == (1, start, 9 - start)
    assert len(solo.logprobs[1]) == 8


def test_kv_of_another_mask_is_not_shared():
    solo = Solo().enter()
    prompt = [1, 2, 3, 4, 2]
    solo.add(spec(0, prompt, max_tokens=8))
    solo.step()
    solo.enter(b"masked")
    solo.add(spec(1, prompt))
    assert shares(solo)[1] == (1, 0, 5)
    solo.add(spec(2, prompt))
    assert shares(solo)[2] == (2, 4, 1)
    solo.enter()
    solo.add(spec(3, prompt))
    assert shares(solo)[-1] == (3, 4, 1)


def test_a_sequence_that_lived_through_a_change_of_mask_names_no_more_blocks():
    solo = Solo().enter()
    solo.add(spec(0, [1, 2, 3, 4, 2], max_tokens=20))
    solo.step()
    named = solo.rank.pool.cached()
    solo.enter(b"masked")
    for _ in range(5):
        solo.step()
    assert solo.rank.pool.cached() == named
    solo.enter()
    for _ in range(5):
        solo.step()
    assert solo.rank.pool.cached() == named


def test_computed_again_from_the_start_its_blocks_have_names_again():
    solo = Solo().enter()
    solo.add(spec(0, [1, 2, 3, 4, 2], max_tokens=20))
    solo.step()
    solo.enter(b"masked")
    solo.step()
    (sequence,) = solo.rank.queues.running
    solo.rank.journal.preempt(sequence)
    solo.rank.journal.clear()
    assert shares(solo) == [(0, 0, 7)]
    assert len(solo.rank.pool.cached()) == 2
