"""One instance under asyncio: the engine, its ranks as local processes, and streams for HTTP."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import msgspec

from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.cluster.local import Callbacks, LocalCluster
from revivemoe.config import EngineConfig
from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.engine import Engine
from revivemoe.engine.ledger import LiveRequest
from revivemoe.engine.metrics import render_metrics
from revivemoe.engine.operations import Operations
from revivemoe.engine.status import status_document
from revivemoe.epochs.state import (
    FailedState,
    Paused,
    Recovering,
    Serving,
    Starting,
    state_name,
)
from revivemoe.executor.spec import HostCacheSpec, RankSpec, SegmentSpec
from revivemoe.health.monitor import HealthMonitor
from revivemoe.health.sources import sources_for
from revivemoe.ids import Incarnation, LayerId, RankId
from revivemoe.membership.placement import place
from revivemoe.messages.reports import (
    Inject,
    Report,
)
from revivemoe.recovery.faults import DeviceReport
from revivemoe.streams import EngineUnavailable, ModelInfo, StreamEvent, Submission

log = logging.getLogger("revivemoe.serving.instance")

TICK_S = 0.05
ADMISSION_WAIT_S = 60.0
"""How long a new request waits for a recovery (or the start) before it gets 503."""
STOP_TIMEOUT_S = 1.0
"""For ranks to exit of their own accord; then they are killed."""
KEPT_EVENTS = 1000
INJECTABLE = ("kill", "hang", "error", "slow", "nan", "comm", "device_fault")
POINTS = ("schedule", "attention", "dispatch", "experts", "combine", "sample", "commit")
SPOILABLE = ("attention", "experts", "combine", "sample")
"""Phases whose output can be turned into NaN."""


class QueueStream:
    """Events of one submission, from the engine's callback to one async reader."""

    def __init__(self, instance: "Instance", degraded: bool) -> None:
        self.degraded_from_start = degraded
        self.request: LiveRequest | None = None
        self._instance = instance
        self._events: deque[StreamEvent] = deque()
        self._ended = False
        self._arrived = asyncio.Event()

    def push(self, event: StreamEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._ended:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def close(self) -> None:
        if self.request is not None and not self._ended:
            self._instance.engine.abort(self.request)


class Instance:
    """Everything one `serve` owns. An async context manager; implements `ServingEngine`."""

    def __init__(self, config: EngineConfig, info: CheckpointInfo, tokenizer: Any) -> None:
        """`config` is resolved. Raises ValueError for a placement that cannot be."""
        assert config.max_model_len is not None
        self.config, self.info = config, info
        self.model = ModelInfo(
            name=config.served_model_name,
            model_dir=str(info.model_dir),
            max_model_len=config.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
        )
        topology = config.topology()
        placement = place(
            info.num_experts,
            info.moe_layers,
            topology.experts,
            config.redundant_experts,
            config.spare_expert_slots,
        )
        self._cluster = LocalCluster(
            self._rank_spec,
            _segment(config, info) if config.comm_backend == "shm" else None,
            config.comm_backend,
            Callbacks(self._on_report, self._on_exit, self._on_forkserver_gone),
            _host_cache(config, info) if config.expert_host_cache else None,
            config.num_microbatches or 1,
        )
        self.engine = Engine(
            config,
            topology,
            placement,
            Vocabulary(tokenizer),
            self._cluster,
            time.monotonic,
            self._on_event,
            config.dense_groups(),
        )
        self._operations = Operations(self.engine)
        self._health: HealthMonitor | None = None
        self.serving = asyncio.Event()
        """Set when the instance serves for the first time."""
        self.ended = asyncio.Event()
        """Set when the instance has failed."""
        self._changed = asyncio.Event()
        """Set at every event; whoever waits for a state clears it and looks again."""
        self._recent: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._subscribers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Instance":
        await self._cluster.__aenter__()
        self.engine.start(time.monotonic())
        self._ticker = asyncio.create_task(self._tick(), name="engine tick")
        self._ticker.add_done_callback(self._on_ticker_done)
        self._watch_devices()
        return self

    def _watch_devices(self) -> None:
        config = self.config
        devices = {rank: config.rank_device(rank) for rank in self.engine.ranks}
        sources = sources_for(config.device, devices, config.kubernetes_node, config.device_health)
        if not sources:
            return
        loop = asyncio.get_running_loop()

        def on_report(report: DeviceReport) -> None:
            loop.call_soon_threadsafe(lambda: self.engine.on_health(report, time.monotonic()))

        self._health = HealthMonitor(sources, on_report)
        self._health.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._ticker is not None
        self._ticker.cancel()
        if self._health is not None:
            self._health.__exit__(kind, error, traceback)
        try:
            self.engine.stop()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while self._cluster.living and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        finally:
            await self._cluster.__aexit__(kind, error, traceback)

    def _on_ticker_done(self, ticker: "asyncio.Task[None]") -> None:
        """Without its tick no deadline is judged any more: that must not go unseen."""
        if not ticker.cancelled() and (error := ticker.exception()) is not None:
            log.error("engine tick failed", exc_info=error)
            self.engine.fail(f"internal error: {error!r}")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._cluster.drain()
            self.engine.tick(time.monotonic())

    # ---- from the cluster --------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        self.engine.on_report(report, time.monotonic())

    def _on_exit(
        self, rank: RankId, incarnation: Incarnation, detail: str, by_itself: bool
    ) -> None:
        self.engine.on_exit(rank, incarnation, detail, time.monotonic(), by_itself=by_itself)

    def _on_forkserver_gone(self) -> None:
        self.engine.on_forkserver_gone()

    def _on_event(self, event: dict[str, Any]) -> None:
        stamped = {"time": time.time(), **event}
        self._recent.append(stamped)
        for subscriber in self._subscribers:
            subscriber.put_nowait(stamped)
        self._changed.set()
        if isinstance(self.engine.state, Serving):
            self.serving.set()
        elif isinstance(self.engine.state, FailedState):
            self.ended.set()

    # ---- for the server ----------------------------------------------------------------------

    async def submit(self, submission: Submission) -> QueueStream:
        """Admit a request once the instance serves: only then is its quality known.

        Raises EngineUnavailable if that takes longer than `ADMISSION_WAIT_S`, or has failed.
        """
        await self._until_settled()
        stream = QueueStream(self, self.engine.degraded)
        stream.request = self.engine.submit(submission, stream)
        return stream

    async def _until_settled(self) -> None:
        deadline = time.monotonic() + ADMISSION_WAIT_S
        while isinstance(self.engine.state, Starting | Recovering | Paused):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                name = state_name(self.engine.state)
                raise EngineUnavailable(f"still {name} after {ADMISSION_WAIT_S:.0f} s", 5.0)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)

    def status(self) -> dict[str, Any]:
        return status_document(self.engine, time.monotonic(), time.time())

    def metrics(self) -> bytes:
        return render_metrics(self.engine, time.monotonic())

    @property
    def alive(self) -> bool:
        return not isinstance(self.engine.state, FailedState)

    @property
    def ready(self) -> bool:
        return isinstance(self.engine.state, Serving)

    async def apply(self, instruction: str, params: dict[str, Any], request_id: str) -> Any:
        return self._operations.apply(instruction, params, request_id, time.monotonic())

    async def inject(self, fault: dict[str, Any]) -> str:
        injection_id = f"inj-{time.monotonic_ns():x}"
        inject = parse_injection(fault, injection_id)
        rank = RankId(_int(fault, "id"))
        if inject.kind == "comm":
            inject = self._with_peer(inject, rank)
        if inject.kind == "device_fault":
            self._inject_report(inject, rank)
        else:
            self.engine.inject(inject, rank)
        return injection_id

    def _with_peer(self, inject: Inject, rank: RankId) -> Inject:
        if self.config.comm_backend != "gloo":
            raise ValueError(
                "kind 'comm' cuts sockets between two ranks: shared memory has none, so it needs "
                "--comm-backend gloo"
            )
        peer = RankId(_int(inject.params, "peer"))
        pid = self._cluster.pid(peer)
        if pid is None or peer == rank or self.engine.ranks[peer].dead:
            raise ValueError(f"'peer' {peer} is not another living rank")
        return msgspec.structs.replace(inject, params={**inject.params, "peer_pid": pid})

    def _inject_report(self, inject: Inject, rank: RankId) -> None:
        level = _int(inject.params, "level")
        if not 0 <= level <= 6:
            raise ValueError(f"'level' {level} is out of range: 1 to 6, or 0 for healthy again")
        code = str(inject.params.get("code", "injected"))
        report = DeviceReport(rank, level, code, "", "injected")
        self.engine.devices.report_at(report, inject.step, time.monotonic())

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for event in self._recent:
            queue.put_nowait(event)
        self._subscribers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)

    # ---- helpers -----------------------------------------------------------------------------

    def _dense_layers(self) -> tuple[LayerId, ...]:
        if self.engine.dense is None:
            return ()
        return tuple(LayerId(layer) for layer in self.info.dense_layers)

    def _dense_shards(self, rank: RankId) -> tuple[int, ...]:
        """What a new process of a rank starts with."""
        home = self.engine.dense.home if self.engine.dense is not None else ()
        return tuple(s for group in home for s, holder in enumerate(group) if holder == rank)

    def _rank_spec(
        self, rank: RankId, incarnation: Incarnation, slots: tuple[tuple[int, ...], ...]
    ) -> RankSpec:
        config, info = self.config, self.info
        assert config.max_model_len is not None
        table = slots or ((),) * len(info.moe_layers)
        return RankSpec(
            rank=rank,
            incarnation=incarnation,
            model_dir=str(info.model_dir),
            attention=rank in self.engine.home.attention,
            dense_layers=self._dense_layers(),
            dense_ffn_tp=config.dense_ffn_tp,
            dense_shards=self._dense_shards(rank),
            slots={LayerId(k): v for k, v in zip(info.moe_layers, table, strict=True)},
            num_experts=info.num_experts,
            top_k=info.top_k,
            dtype=config.dtype,
            device=config.rank_device(rank),
            threads=config.threads_per_rank,
            block_size=config.block_size,
            num_kv_blocks=config.num_kv_blocks,
            kv_memory_share=0.5 / config.data_parallel_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            prefill_tokens_beside_decodes=config.prefill_tokens_beside_decodes,
            commands="",
            reports="",
            allow_faults=config.enable_fault_injection,
        )


def _segment(config: EngineConfig, info: CheckpointInfo) -> SegmentSpec:
    return SegmentSpec(
        num_ranks=config.num_ranks,
        channels=config.num_microbatches or 1,
        max_tokens=config.max_num_batched_tokens,
        hidden=info.hidden_size,
        itemsize=2 if config.dtype == "bfloat16" else 4,
        top_k=max(info.top_k, config.dense_ffn_tp),
    )


def _host_cache(config: EngineConfig, info: CheckpointInfo) -> HostCacheSpec:
    layers = tuple(LayerId(layer) for layer in info.moe_layers)
    return HostCacheSpec(str(info.model_dir), layers, info.num_experts, config.dtype)


def _int(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key!r} must be an integer")
    return value


def parse_injection(fault: dict[str, Any], injection_id: str) -> Inject:
    """The fault asked for, as a rank can decode it. Raises ValueError with what is wrong."""
    kind, at = fault.get("kind"), fault.get("at") or {}
    if kind not in INJECTABLE:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(INJECTABLE)}")
    if not isinstance(at, dict) or not at.keys() <= {"step", "layer", "phase"}:
        raise ValueError("'at' must be an object with step, layer, phase")
    if at.get("phase") not in (None, *POINTS):
        raise ValueError(f"'phase' must be one of {', '.join(POINTS)}")
    if kind == "nan" and at.get("phase") not in (None, *SPOILABLE):
        raise ValueError(f"kind 'nan' strikes in one of {', '.join(SPOILABLE)}")
    document = {**at, "injection_id": injection_id, "kind": kind}
    try:
        inject = msgspec.convert(
            {"type": "Inject", **document, "params": fault.get("params") or {}}, Inject
        )
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    factor = inject.params.get("factor", 5)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
        raise ValueError("'factor' must be a number of at least 1")
    if inject.params.get("how", "loop") not in ("loop", "stop", "deadlock"):
        raise ValueError("'how' must be loop, stop or deadlock")
    return inject
