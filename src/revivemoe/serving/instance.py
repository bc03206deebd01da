"""One instance under asyncio: the engine, its ranks as local processes, and streams for HTTP."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from functools import partial

from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.cluster.launcher import EarlyStart
from revivemoe.cluster.local import Callbacks, LocalCluster
from revivemoe.config import EngineConfig
from revivemoe.detokenizer import Tokenizer, Vocabulary
from revivemoe.engine.engine import Engine
from revivemoe.engine.intake import Intake
from revivemoe.engine.metrics import render_metrics
from revivemoe.engine.operations import Operations
from revivemoe.engine.status import status_document
from revivemoe.epochs.state import FailedState, Paused, Recovering, Serving, Starting, state_name
from revivemoe.health.monitor import HealthMonitor
from revivemoe.health.source import HealthSource
from revivemoe.health.sources import sources_for
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import place
from revivemoe.messages.events import Event, document
from revivemoe.recovery.faults import DeviceReport
from revivemoe.sampling_params import SamplingDefaults
from revivemoe.serving.event_log import EventLog
from revivemoe.serving.injection import Injector
from revivemoe.serving.specs import host_cache_spec, rank_spec, segment_spec
from revivemoe.serving.stream import QueueStream
from revivemoe.streams import Document, EngineUnavailable, ModelInfo, Submission

log = logging.getLogger("revivemoe.serving.instance")

TICK_S = 0.05
ADMISSION_WAIT_S = 55.0
"""How long a new request waits for a recovery (or the start) before it gets 503: proxies answer in
the server's place after 60 s (nginx, load balancers), and then nobody hears why or when to retry.
"""
STREAM_WAIT_S = 600.0
"""As long as clients wait by default (`openai`): comments hold the line meanwhile."""
STOP_TIMEOUT_S = 1.0
"""For ranks to exit of their own accord; then they are killed."""


class Instance:
    """Everything one `serve` owns. An async context manager; implements `ServingEngine`."""

    def __init__(
        self,
        config: EngineConfig,
        info: CheckpointInfo,
        tokenizer: Tokenizer,
        defaults: SamplingDefaults | None = None,
        early: EarlyStart | None = None,
    ) -> None:
        """`config` is resolved; `defaults`: of requests that do not say; `early`: a fork server
        that has been started already.

        Raises ValueError for a placement that cannot be.
        """
        assert config.max_model_len is not None
        self.config, self.info = config, info
        self.model = ModelInfo(
            name=config.served_model_name,
            model_dir=str(info.model_dir),
            max_model_len=config.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            defaults=defaults or SamplingDefaults(),
        )
        topology = config.topology()
        redundant, spare = config.redundant_experts, config.spare_expert_slots
        placement = place(info.num_experts, info.moe_layers, topology.experts, redundant, spare)
        home = Membership(topology, placement, config.dense_groups())
        self._cluster = LocalCluster(
            partial(rank_spec, config, info, home),
            segment_spec(config, info) if config.comm_backend == "shm" else None,
            config.comm_backend,
            Callbacks(
                lambda report: self._intake.report(report, time.monotonic()),
                lambda rank, inc, pid: self._intake.arrived(rank, inc, pid, time.monotonic()),
                lambda rank, inc, how, alone: self._intake.exited(
                    rank, inc, how, alone, time.monotonic()
                ),
                lambda: self._intake.forkserver_gone(time.monotonic()),
            ),
            host_cache_spec(config, info) if config.expert_host_cache else None,
            config.num_microbatches or 1,
            kernels=config.kernels != "torch" and config.device != "cuda",
            early=early,
        )
        self.engine = Engine(
            config, home, Vocabulary(tokenizer), self._cluster, time.monotonic, self._on_event
        )
        self._intake = Intake(self.engine)
        self._operations = Operations(self.engine)
        self._injector = Injector(self.engine, self._operations, self._cluster)
        self._health: HealthMonitor | None = None
        self.serving = asyncio.Event()
        """Set when the instance serves for the first time."""
        self.ended = asyncio.Event()
        """Set when the instance has failed."""
        self._changed = asyncio.Event()
        """Set at every event; whoever waits for a state clears it and looks again."""
        self._events = EventLog()
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Instance":
        sources = self._health_sources()
        await self._cluster.__aenter__()
        self.engine.start(time.monotonic())
        self._ticker = asyncio.create_task(self._tick(), name="engine tick")
        self._ticker.add_done_callback(self._on_ticker_done)
        self._watch_devices(sources)
        return self

    def _health_sources(self) -> list[HealthSource]:
        """Before anything is launched: a wrong set-up is said at once. Raises ValueError."""
        config = self.config
        devices = {rank: config.rank_device(rank) for rank in self.engine.ranks}
        return sources_for(config.device, devices, config.kubernetes_node, config.device_health)

    def _watch_devices(self, sources: list[HealthSource]) -> None:
        if not sources:
            return
        loop = asyncio.get_running_loop()

        def on_report(report: DeviceReport) -> None:
            loop.call_soon_threadsafe(lambda: self._intake.health(report, time.monotonic()))

        self._health = HealthMonitor(sources, on_report)
        self._health.start()

    async def __aexit__(self, *raised: object) -> None:
        assert self._ticker is not None
        self._ticker.cancel()
        loop, health = asyncio.get_running_loop(), self._health
        unwatched = None if health is None else loop.run_in_executor(None, health.stop)
        try:
            self.engine.stop()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while self._cluster.living and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            if unwatched is not None:
                await unwatched
        finally:
            await self._cluster.__aexit__(*raised)

    def _on_ticker_done(self, ticker: "asyncio.Task[None]") -> None:
        """Without its tick no deadline is judged any more: that must not go unseen."""
        if not ticker.cancelled() and (error := ticker.exception()) is not None:
            log.error("engine tick failed", exc_info=error)
            self.engine.fail(f"internal error: {error!r}")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._cluster.drain()
            self._intake.tick(time.monotonic())

    # ---- from the cluster --------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        self._events.add({"time": time.time(), **document(event)})
        self._changed.set()
        if isinstance(self.engine.state, Serving):
            self.serving.set()
        elif isinstance(self.engine.state, FailedState):
            self.ended.set()

    # ---- for the server ----------------------------------------------------------------------

    async def submit(self, submission: Submission) -> QueueStream:
        """Admit a request once the instance serves: only then is its quality known.

        Raises EngineUnavailable if that takes too long, or has failed.
        """
        await self._until_settled(STREAM_WAIT_S if submission.streamed else ADMISSION_WAIT_S)
        stream = QueueStream(self.engine.degraded)
        stream.abort = partial(self.engine.abort, self.engine.submit(submission, stream))
        return stream

    async def _until_settled(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while isinstance(self.engine.state, Starting | Recovering | Paused):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                name = state_name(self.engine.state)
                raise EngineUnavailable(f"still {name} after {within_s:.0f} s", 5.0)
            self._changed.clear()
            # Not `wait_for`: until Python 3.12 it drops a cancel that comes with the change.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def status(self) -> Document:
        return status_document(self.engine, time.monotonic(), time.time())

    def metrics(self) -> bytes:
        return render_metrics(self.engine)

    @property
    def state_name(self) -> str:
        return state_name(self.engine.state)

    @property
    def alive(self) -> bool:
        return not isinstance(self.engine.state, FailedState)

    @property
    def ready(self) -> bool:
        return isinstance(self.engine.state, Serving)

    async def apply(self, instruction: str, params: Document, request_id: str) -> Document | None:
        return self._operations.apply(instruction, params, request_id, time.monotonic())

    async def inject(self, fault: Document) -> str:
        injection_id = f"inj-{time.monotonic_ns():x}"
        self._injector.inject(fault, injection_id, time.monotonic())
        return injection_id

    def events(self) -> AsyncIterator[Document]:
        return self._events.follow()
