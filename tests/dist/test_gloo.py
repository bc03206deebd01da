"""The loss of a rank over gloo, where the survivors' pending exchanges cannot be cancelled."""

import random

from support.cases import OUTPUT_TOKENS, Case, Weights, check_all, requests_of
from support.client import run_load
from support.deployment import deployed
from support.faults import unlike


def test_no_stream_notices_the_loss_of_a_rank(
    qwen: Weights, mixed: list[Case], chaos_seed: int
) -> None:
    cases = mixed[::2]
    draw = random.Random(chaos_seed)
    victim, after, layer = draw.randrange(3), draw.randrange(5, OUTPUT_TOKENS), draw.randrange(4)
    told = f"seed {chaos_seed}: rank {victim}, {after} steps on, in layer {layer}"
    flags = "--redundant-experts", "16", "--comm-backend", "gloo", "--enable-fault-injection"
    with deployed(qwen.dir, 3, *flags) as server:
        server.inject_kill(victim, step=after, phase="experts", layer=layer)
        fault = run_load(server.url, requests_of(cases))
        assert not check_all(cases, fault), told
        (recovery,) = server.await_idle()["recoveries"]
        assert recovery["outcome"] == "recovered", told
        assert recovery["stall_s"] < 10, told
        assert set(server.per_rank("revivemoe_rank_survivor_refills_total").values()) == {0}, told
        again = run_load(server.url, requests_of(cases))
        assert not unlike(fault, again, cases), told
