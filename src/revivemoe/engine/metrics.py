"""Prometheus metrics, collected from the engine at the moment they are asked for."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from revivemoe.engine.engine import Engine
from revivemoe.epochs.record import PHASES
from revivemoe.epochs.state import state_name

STATES = ("starting", "serving", "recovering", "paused", "failed")


class EngineCollector:
    """Reads one engine; holds nothing itself, so that the figures cannot drift from the truth."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        yield from self._membership()
        yield from self._load()
        yield from self._recoveries()

    def _membership(self) -> Iterable[Metric]:
        engine = self._engine
        state = GaugeMetricFamily("revivemoe_state", "1 for the present state", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == state_name(engine.state)))
        yield state
        yield GaugeMetricFamily("revivemoe_epoch", "Membership epoch", engine.membership.epoch)
        yield GaugeMetricFamily(
            "revivemoe_experts_missing",
            "Experts without a live replica, over all layers",
            len(engine.membership.missing),
        )
        yield GaugeMetricFamily(
            "revivemoe_ranks_alive",
            "Ranks that are members and not dead",
            sum(view.member for view in engine.ranks.values()),
        )

        yield GaugeMetricFamily(
            "revivemoe_device_faults_refused",
            "Signals of monitors that ask for ranks which the instance cannot do without",
            sum(1 for _ in engine.devices.signals.refused),
        )

    def _load(self) -> Iterable[Metric]:
        ranks = self._engine.ranks.values()
        for name, text in (
            ("running", "Sequences running"),
            ("waiting", "Sequences waiting"),
            ("kv_blocks_used", "KV blocks in use"),
            ("kv_blocks_total", "KV blocks there are"),
            ("memory_bytes", "What weights, expert slots and KV pages take"),
        ):
            gauge = GaugeMetricFamily(f"revivemoe_rank_{name}", text, labels=["rank"])
            for view in ranks:
                gauge.add_metric([str(view.rank)], 0 if view.dead else getattr(view.stats, name))
            yield gauge
        refills = "Tokens computed again on a rank that held them before a fence; stays 0"
        for name, field, text in (
            ("preemptions", "preemptions", "Sequences preempted for want of blocks"),
            ("prefix_hit_tokens", "prefix_hit_tokens", "Prompt tokens found in cache"),
            ("prefilled_tokens", "prefilled_tokens", "Tokens run as prefill"),
            ("step_seconds", "step_s", "Time spent in steps"),
            ("wait_seconds", "waited_s", "Of that, time spent waiting for peers"),
            ("survivor_refills", "survivor_refills", refills),
            ("recompiled_graphs", "recompiled", "Layer graphs compiled while serving; stays 0"),
        ):
            counter = CounterMetricFamily(f"revivemoe_rank_{name}", text, labels=["rank"])
            for view in ranks:
                counter.add_metric([str(view.rank)], getattr(view.stats, field))
            yield counter

    def _recoveries(self) -> Iterable[Metric]:
        engine, totals = self._engine, self._engine.traffic.totals
        ledger, symptoms = engine.traffic.ledger, engine.signals.symptoms
        for name, text, value in (
            ("generation_tokens", "Tokens appended to the logs", totals.generation_tokens),
            ("prompt_tokens", "Prompt tokens admitted", totals.prompt_tokens),
            ("migrated_sequences", "Sequences moved off lost ranks", totals.migrated),
            ("recomputed_tokens", "Tokens migrations computed again", totals.recomputed_tokens),
            ("communication_symptoms", "Steps aborted by communication", symptoms),
            ("mended_sequences", "Handed over again where they were to be", totals.mended),
            ("request_faults", "Requests ended by an error of the engine's own", ledger.faults),
            ("token_log_gaps", "Reports that skipped a position; mended", ledger.gaps),
        ):
            yield CounterMetricFamily(f"revivemoe_{name}", text, value)
        finished = CounterMetricFamily(
            "revivemoe_sequences_finished", "Finished sequences", labels=["finish_reason"]
        )
        for reason, count in sorted(totals.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        errors = CounterMetricFamily(
            "revivemoe_internal_errors", "Exceptions that were contained", labels=["what"]
        )
        for what, count in sorted(totals.internal_errors.items()):
            errors.add_metric([what], count)
        yield errors
        recoveries = CounterMetricFamily(
            "revivemoe_recoveries", "Recoveries by cause and outcome", labels=["cause", "outcome"]
        )
        for labels, count in sorted(engine.epochs.outcomes.items()):
            recoveries.add_metric(list(labels), count)
        yield recoveries
        yield from self._last_recovery()

    def _last_recovery(self) -> Iterable[Metric]:
        if not self._engine.epochs.records:
            return
        record = self._engine.epochs.records[-1]
        phases = GaugeMetricFamily(
            "revivemoe_last_recovery_phase_seconds", "Phases of the last recovery", labels=["phase"]
        )
        for phase in PHASES:
            phases.add_metric([phase], record.phases[phase])
        yield phases
        if record.stall_s is not None:
            yield GaugeMetricFamily(
                "revivemoe_last_recovery_stall_seconds",
                "Last step of the old epoch to the first of the new",
                record.stall_s,
            )


def render_metrics(engine: Engine) -> bytes:
    """Exposition text."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return generate_latest(registry)
