"""A request never changes another's numbers beyond rounding, whatever else is in the step."""

import random
from collections.abc import Callable

import pytest
from support.cases import Weights, plain_cases
from support.solo import SoloRank

from revivemoe.checkpoint.presets import ARCHS
from revivemoe.core.limits import RankLimits
from revivemoe.ids import SeqId
from revivemoe.sampling_params import SamplingParams

PARAMS = SamplingParams(seed=3, temperature=0.8, max_tokens=12, logprobs=20)
LENGTHS = (1, 150, 7, 40, 90, 33, 64)
LIMITS = RankLimits(
    num_blocks=200,
    block_size=8,
    max_num_seqs=16,
    max_num_batched_tokens=24,
    max_model_len=256,
    prefill_tokens_beside_decodes=8,
)
TOLERANCE = 1e-5
"""Of the largest number there: rounding in fp32."""

Numbers = dict[SeqId, list[dict[int, float]]]
"""By sequence and output position: log-probabilities of the most likely tokens."""


def numbers(solo: SoloRank) -> Numbers:
    found: Numbers = {}
    for token in solo.committed:
        assert token.logprobs is not None
        found.setdefault(token.seq_id, []).append(dict(token.logprobs.top))
    solo.committed.clear()
    return found


def alone(solo: SoloRank, prompts: list[list[int]]) -> Numbers:
    """Each by itself: one sequence, nobody beside it."""
    found: Numbers = {}
    for seq, prompt in enumerate(prompts):
        solo.run([prompt], PARAMS)
        found[SeqId(seq)] = numbers(solo)[SeqId(0)]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_numbers_do_not_depend_on_who_else_is_there(
    arch: str, weights_of: Callable[[str], Weights], chaos_seed: int
) -> None:
    """Others join and leave, prompts are cut elsewhere, steps are undone, sequences move."""
    draw = random.Random(chaos_seed)
    weights = weights_of(arch)
    # Screened: where two experts or tokens are equal but for rounding, either may be taken.
    cases = plain_cases(weights, PARAMS, len(LENGTHS), LENGTHS)
    prompts = [list(case.request.body["prompt"]) for case in cases]
    solo = SoloRank(weights.dir, LIMITS)
    expected = alone(solo, prompts)
    for attempt in range(2):
        if attempt:
            solo.run_interrupted(prompts, PARAMS, draw)
        else:
            solo.run(prompts, PARAMS, steps_apart=2)
        check(expected, numbers(solo), f"{arch}, seed {chaos_seed}, attempt {attempt}")


def check(expected: Numbers, found: Numbers, told: str) -> None:
    assert found.keys() == expected.keys()
    largest = max(
        abs(p) for positions in expected.values() for top in positions for p in top.values()
    )
    for seq, positions in expected.items():
        for position, top in enumerate(positions):
            other = found[seq][position]
            both = top.keys() & other.keys()
            worst = max(abs(top[token] - other[token]) for token in both)
            assert worst < TOLERANCE * largest, (
                f"{told}: sequence {seq}, position {position}: {worst}"
            )
            assert len(both) >= len(top) - 2, "of equal ones another may be the last"
