"""Too few KV blocks for everybody: sequences give way, come back, and lose nothing."""

import random

from support.cases import Weights, check_all, plain_cases, requests_of
from support.client import run_load
from support.deployment import deployed
from support.faults import killer
from support.solo import SoloRank

from revivemoe.core.limits import RankLimits
from revivemoe.sampling_params import SamplingParams

MAX_MODEL_LEN, BLOCK = 96, 8
SCARCE = (
    "--redundant-experts", "16", "--block-size", str(BLOCK),
    "--max-model-len", str(MAX_MODEL_LEN), "--num-kv-blocks", str(MAX_MODEL_LEN // BLOCK + 8),
)  # fmt: skip


def test_preempted_sequences_lose_nothing_and_survive_a_kill(
    qwen: Weights, chaos_seed: int
) -> None:
    cases = [
        *plain_cases(qwen, SamplingParams(seed=0, temperature=0.0, max_tokens=48), 9, (24, 5, 40)),
        *plain_cases(qwen, SamplingParams(seed=6, temperature=0.9, max_tokens=48), 9, (9, 30)),
    ]
    draw = random.Random(chaos_seed)
    moment = draw.randrange(3), draw.randrange(len(cases) * 48 // 4, len(cases) * 48 * 3 // 4)
    told = f"seed {chaos_seed}: rank and token {moment}"
    with deployed(qwen.dir, 3, *SCARCE) as server:
        calm = run_load(server.url, requests_of(cases))
        server.await_idle()
        before = server.per_rank("revivemoe_rank_preemptions_total")
        assert not check_all(cases, calm)
        assert min(before.values()) > 0, "blocks were not scarce"
        fault = run_load(server.url, requests_of(cases), killer(server, moment))
        assert not check_all(cases, fault), told
        server.await_idle()
        after = server.per_rank("revivemoe_rank_preemptions_total")
        assert all(after[r] > before[r] for r in after if r != moment[0]), told


def test_steps_undone_while_blocks_are_scarce_leave_no_trace(
    qwen: Weights, chaos_seed: int
) -> None:
    """Every prompt comes six times, so that what the prefix cache names is read again."""
    params = SamplingParams(seed=0, temperature=0.0, max_tokens=40)
    cases = plain_cases(qwen, params, 4, (40, 48))
    draw = random.Random(chaos_seed)
    repeated = draw.sample(6 * cases, 6 * len(cases))
    limits = RankLimits(
        num_blocks=MAX_MODEL_LEN // BLOCK + 3,
        block_size=BLOCK,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=MAX_MODEL_LEN,
    )
    solo = SoloRank(qwen.dir, limits)
    prompts = [case.request.body["prompt"] for case in repeated]
    outputs = solo.run_interrupted(prompts, params, draw)
    told = f"seed {chaos_seed}"
    assert outputs == [case.expected[0] for case in repeated], told
    assert solo.rank.stats().preemptions > 0, told
    assert solo.rank.stats().prefix_hit_tokens > 0, told
