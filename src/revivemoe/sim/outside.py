"""What reaches the engine from outside: an operator's instructions, and what monitors say."""

import contextlib
from functools import partial

from revivemoe.engine.operations import Operations
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport
from revivemoe.sim.clock import Clock
from revivemoe.sim.host import EngineHost
from revivemoe.streams import Document


class Outside:
    """Speaks to the engine of one simulated host."""

    def __init__(self, clock: Clock, host: EngineHost) -> None:
        self._clock, self._host = clock, host
        self._operations: Operations | None = None

    def instruct(self, instruction: str, params: Document) -> None:
        self._host.call(partial(self._apply, instruction, params))

    def _apply(self, instruction: str, params: Document) -> None:
        """As an operator would; what is refused now is not asked for again."""
        if self._operations is None:
            self._operations = Operations(self._host.engine)
        request_id = f"{instruction} {self._clock.num_actions}"
        with contextlib.suppress(ValueError):
            self._operations.apply(instruction, params, request_id, self._clock.now)

    def tell_health(self, report: DeviceReport) -> None:
        self._host.call(partial(self._on_health, report))

    def tell_health_of(self, code: str, ranks: tuple[RankId, ...], level: int) -> None:
        """One signal about all of these, told of each."""
        for rank in ranks:
            self.tell_health(
                DeviceReport(rank, level, code, "drawn by the seed", "injected", ranks)
            )

    def _on_health(self, report: DeviceReport) -> None:
        self._host.engine.on_health(report, self._clock.now)
