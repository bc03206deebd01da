from prometheus_client.parser import text_string_to_metric_families
from unit.control_plane import Instance

from revivemoe.engine.metrics import render_metrics
from revivemoe.recovery.policy import Policy

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(instance: Instance) -> Samples:
    text = render_metrics(instance.engine).decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("revivemoe_")
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"revivemoe_{name}", tuple(sorted(labels.items()))]


def test_exactly_one_state_at_any_time() -> None:
    instance = Instance(redundant=0, policy=Policy(repair=("mask",)))
    for act, state in (
        (lambda: None, "starting"),
        (instance.start, "serving"),
        (lambda: instance.die(1, deliver=False), "recovering"),
        (instance.deliver, "failed"),
    ):
        act()
        found = samples(instance)
        shown = {labels[0][1]: v for (n, labels), v in found.items() if n == "revivemoe_state"}
        assert sum(shown.values()) == 1
        assert shown[state] == 1
        assert shown.keys() == {"starting", "serving", "recovering", "paused", "failed"}


def test_figures_of_a_recovery() -> None:
    instance = Instance().start()
    for prompt in ((1,), (2,), (3,), (4,), (5,)):
        instance.submit(prompt, max_tokens=10)
    instance.step(3)
    before = samples(instance)
    assert value(before, "generation_tokens_total") == 15
    assert value(before, "prompt_tokens_total") == 5
    assert value(before, "ranks_alive") == 4
    assert not any(name.startswith("revivemoe_last_recovery") for name, _ in before)
    instance.die(1)
    instance.step(7)
    found = samples(instance)
    assert value(found, "epoch") == 2
    assert value(found, "ranks_alive") == 3
    assert value(found, "recoveries_total", cause="process_exit", outcome="recovered") == 1
    assert value(found, "migrated_sequences_total") == 1
    assert value(found, "recomputed_tokens_total") == 4
    assert value(found, "sequences_finished_total", finish_reason="length") == 5
    assert value(found, "generation_tokens_total") == 50
    assert value(found, "token_log_gaps_total") == 0
    assert value(found, "communication_symptoms_total") == 0
    assert value(found, "last_recovery_phase_seconds", phase="domain") == 0.25
    assert value(found, "last_recovery_stall_seconds") > 0


def test_load_by_rank() -> None:
    instance = Instance(num_ranks=2).start()
    instance.submit()
    for fake in instance.cluster.ranks.values():
        fake.beat()
    instance.deliver()
    found = samples(instance)
    assert value(found, "rank_running", rank="0") + value(found, "rank_running", rank="1") == 1
    assert value(found, "rank_kv_blocks_used", rank="0") == 2
    assert value(found, "rank_kv_blocks_total", rank="1") == 64
    assert value(found, "rank_survivor_refills_total", rank="0") == 0
    instance.die(0)
    assert value(samples(instance), "rank_kv_blocks_used", rank="0") == 0


def test_missing_experts_show() -> None:
    instance = Instance(redundant=0, policy=Policy(max_missing_fraction=0.25)).start()
    assert value(samples(instance), "experts_missing") == 0
    instance.die(1)
    assert value(samples(instance), "experts_missing") == 4
