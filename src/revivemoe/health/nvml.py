"""NVIDIA devices through NVML (`nvidia-ml-py`): Xid events, ECC, row remapping, lost devices.

| condition | level | why |
|---|---|---|
| `xid-N` | `xids.XID_LEVELS` | NVIDIA's catalog |
| `ecc-uncorrected` | 4 | the volatile counter has risen while we watch: contained, but drain |
| `row-remap-pending` | 4 | takes effect at a reset: drain, so that one can be made |
| `row-remap-failed` | 5 | no spare row was left: the board is to be exchanged |
| `recovery-action-N` | `RECOVERY_LEVELS` | what the driver itself asks for |
| `reset-required` | 5 | queries are refused until a reset |
| `gpu-lost` | 6 | fallen off the bus: any query says so |

Names of the library: "NVML API Reference", docs.nvidia.com/deploy/nvml-api. What an older one, or
the driver, lacks is left out, call by call (`nvml_library`). A device whose name nobody knows is
not watched, and that is said: it is no fault of a device.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

from revivemoe.health.nvml_library import DeviceId, Library, Unknown
from revivemoe.health.source import Changes
from revivemoe.health.xids import xid_level
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport

log = logging.getLogger("revivemoe.health")

_NO_FIELDS: list[SimpleNamespace] = []

WAIT_MS = 100
"""For a first event; what else is queued is taken without waiting."""
MAX_EVENTS_PER_POLL = 64
MILD = 3
"""Up to this level an Xid is over when it has not come again for a while. One that asks for a
reset stays for as long as we run: without one, nothing says that it is over."""
MILD_HOLD_S = 60.0

RECOVERY_LEVELS: dict[int, tuple[int, str]] = {
    1: (5, "reset the GPU"),
    2: (6, "reboot the node"),
    3: (4, "drain peer-to-peer traffic"),
    4: (4, "drain, then reset the GPU"),
    5: (5, "recover the IMEX domain"),
    6: (6, "reset the bus"),
    7: (6, "reboot the system"),
}
"""NVML_GPU_RECOVERY_ACTION_*; 0 is none."""


@dataclass(frozen=True)
class Condition:
    """One thing that is wrong with one device now."""

    code: str
    level: int
    detail: str
    times: int = 0
    """See `DeviceReport`."""


class NvmlSource:
    """Watches some devices of this host; makes no call before the first poll.

    `nvml` is the module `pynvml`, or one with its names. `ranks_of_device` says which ranks use a
    device; several may share one, and several be MIG instances of one GPU, which speaks for them
    all. Times in seconds.
    """

    name = "nvml"

    def __init__(
        self,
        nvml: ModuleType,
        ranks_of_device: Mapping[DeviceId, Sequence[RankId]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._library = Library(nvml)
        self._ranks_of_device = {d: tuple(ranks) for d, ranks in ranks_of_device.items()}
        self._clock = clock
        self._session: Session | None = None
        self._xids: dict[tuple[DeviceId, int], tuple[float, int]] = {}
        """When each Xid was last seen, and how often."""
        self._last: dict[DeviceId, list[Condition]] = {}
        """What the queries have found of each device."""
        self._fewest_ecc: dict[DeviceId, int] = {}
        """Uncorrected errors that were there before we watched, or are left after a reset."""
        self._gpus: dict[DeviceId, str] = {}
        """UUIDs of the GPUs that the devices are, or are a part of, as far as they were found."""
        self._deaf: set[DeviceId] = set()
        """Of which it has been said that their Xids cannot be had."""
        self._changes = Changes()
        self._unknown: set[DeviceId] = set()
        """Of which it has been said that they cannot be watched."""

    def poll(self) -> list[DeviceReport]:
        """See `HealthSource`. Takes at most `WAIT_MS` beside the driver's own time.

        Raises NVMLError if no device can be asked (no driver, no permission); the next call begins
        with a new session. One that cannot be asked beside others is as it was.
        """
        if self._session is None:
            self._session = Session(self._library, tuple(self._ranks_of_device))
        now, session = self._clock(), self._session
        deaf = self._hear(session, now)
        self._ask_all(session)
        if deaf:
            self._drop_session()
        return self._changes.to(
            DeviceReport(rank, c.level, c.code, c.detail, self.name, shared, c.times)
            for device, ranks in self._ranks_of_device.items()
            for shared in (self._sharing(device),)
            for c in (*self._of_xids(device, now), *self._last.get(device, ()))
            for rank in ranks
        )

    def _hear(self, session: "Session", now: float) -> bool:
        """Take note of Xids. True if the session has none: its queries still can be asked."""
        try:
            for device, xid in session.xids():
                _, times = self._xids.get((device, xid), (now, 0))
                self._xids[device, xid] = now, times + 1
        except self._library.nvml.NVMLError as error:
            self._say_deaf(dict.fromkeys(self._ranks_of_device, error))
            return True
        self._say_deaf(session.unheard)
        return False

    def _say_deaf(self, unheard: Mapping[DeviceId, Exception]) -> None:
        """Once of each, until it is heard again."""
        if news := [device for device in unheard if device not in self._deaf]:
            which, why = ", ".join(map(str, news)), unheard[news[0]]
            said = f"{type(why).__name__}: {why}"
            log.warning("%s: Xids of %s cannot be had, tried again: %s", self.name, which, said)
        self._deaf = set(unheard)

    def _sharing(self, device: DeviceId) -> tuple[RankId, ...]:
        """Ranks of the GPU that the device is, or is a part of; none if there is but one."""
        gpu, ranks = self._gpus.get(device), self._ranks_of_device
        same = [d for d in ranks if d == device or (gpu is not None and self._gpus.get(d) == gpu)]
        together = tuple(dict.fromkeys(rank for d in same for rank in ranks[d]))
        return together if len(together) > 1 else ()

    def _ask_all(self, session: "Session") -> None:
        failed: dict[DeviceId, Exception] = {}
        for device in self._ranks_of_device:
            try:
                self._last[device] = list(self._conditions(session, device))
            except self._library.nvml.NVMLError as error:
                failed[device] = error
        self._gpus |= session.gpus
        if failed and len(failed) == len(self._ranks_of_device):
            self._drop_session()
            raise next(iter(failed.values()))
        for device, why in failed.items():
            self._say(device, f"{type(why).__name__}: {why}")

    def _drop_session(self) -> None:
        """Whether it can be closed or not: the next poll begins with another one."""
        with suppress(self._library.nvml.NVMLError):
            self.close()

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _conditions(self, session: "Session", device: DeviceId) -> Iterator[Condition]:
        try:
            yield from self._of_queries(session, device)
        except Unknown as error:
            self._say(device, str(error))
        except self._library.lost as error:
            yield Condition("gpu-lost", 6, f"GPU {device} is lost: {error}")
        except self._library.reset_required as error:
            yield Condition("reset-required", 5, f"GPU {device}: {error}")

    def _say(self, device: DeviceId, why: str) -> None:
        """Once in a session."""
        if device not in self._unknown:
            self._unknown.add(device)
            log.warning("%s: the health of %s stays unknown: %s", self.name, device, why)

    def _of_xids(self, device: DeviceId, now: float) -> Iterator[Condition]:
        for (where, xid), (seen, times) in self._xids.items():
            level, meaning = xid_level(xid)
            if where == device and (level > MILD or now - seen < MILD_HOLD_S):
                said = f"GPU {device}, Xid {xid}: {meaning}"
                yield Condition(f"xid-{xid}", level, said, times if level >= MILD else 0)

    def _of_queries(self, session: "Session", device: DeviceId) -> Iterator[Condition]:
        count = session.uncorrected_ecc(device)
        fewest = self._fewest_ecc[device] = min(count, self._fewest_ecc.get(device, count))
        if count > fewest:
            yield Condition(
                "ecc-uncorrected", 4, f"GPU {device}: {count - fewest} uncorrected ECC errors"
            )
        pending, failed = session.row_remapping(device)
        if pending:
            yield Condition("row-remap-pending", 4, f"GPU {device}: rows wait for a reset")
        if failed:
            yield Condition("row-remap-failed", 5, f"GPU {device}: remapping a row failed")
        action = session.recovery_action(device)
        if action in RECOVERY_LEVELS:
            level, meaning = RECOVERY_LEVELS[action]
            yield Condition(f"recovery-action-{action}", level, f"GPU {device}: {meaning}")


class Session:
    """The library, initialised, with an event set and the handles of the watched devices."""

    def __init__(self, library: Library, devices: Sequence[DeviceId]) -> None:
        """Raises NVMLError; then nothing is left open."""
        self._library = library
        self._events: object = None
        self._no_events: Exception | None = None
        """Why there are none, where there should be."""
        self.unheard: dict[DeviceId, Exception] = {}
        """Devices whose events are refused, and why."""
        self._handles: dict[DeviceId, object] = {}
        self.gpus: dict[DeviceId, str] = {}
        """UUIDs of the GPUs; several devices may be parts of one."""
        library.nvml.nvmlInit()
        try:
            self._events = library.ask("nvmlEventSetCreate", otherwise=None)
        except library.nvml.NVMLError as error:
            self._no_events = error
        for device in devices:
            # One that cannot be had now is not given up: its queries say why, and look again.
            with suppress(Unknown, library.nvml.NVMLError):
                self._handle(device)

    def close(self) -> None:
        try:
            if self._events is not None:
                self._library.nvml.nvmlEventSetFree(self._events)
        finally:
            self._library.nvml.nvmlShutdown()

    def _handle(self, device: DeviceId) -> object:
        """Found, and registered for events, the first time it can be had. Raises Unknown."""
        if device not in self._handles:
            handle = self._library.find(device)
            uuid = self._library.nvml.nvmlDeviceGetUUID(handle)
            if uuid not in self.gpus.values():
                self._listen(device, handle)
            self.gpus[device] = uuid
            self._handles[device] = handle
        return self._handles[device]

    def _listen(self, device: DeviceId, handle: object) -> None:
        """Register it for events. Who refuses them may still be asked; who is lost, or wants a
        reset, cannot: that is raised.
        """
        library = self._library
        xids = library.name("nvmlEventTypeXidCriticalError", 0)
        if self._events is None or not xids:
            return
        try:
            library.ask("nvmlDeviceRegisterEvents", handle, xids, self._events, otherwise=None)
        except (*library.lost, *library.reset_required):
            raise
        except library.nvml.NVMLError as error:
            self.unheard[device] = error
        else:
            self.unheard.pop(device, None)

    def xids(self) -> Iterator[tuple[DeviceId, int]]:
        """Xids since the last call, in their order: of each device that is a part of the GPU.
        Raises NVMLError where no events can be had: once a device is lost, those of the whole set.
        """
        library, wait_ms = self._library, WAIT_MS
        if self._no_events is not None:
            raise self._no_events
        if self._events is None:
            return
        for device in list(self.unheard):
            with suppress(*library.lost, *library.reset_required):  # its queries say so
                self._listen(device, self._handles[device])
        for _ in range(MAX_EVENTS_PER_POLL):
            try:
                event = library.ask(library.event_wait, self._events, wait_ms, otherwise=None)
            except library.timeout:
                return
            if event is None:
                return
            wait_ms = 0
            if event.eventType == library.nvml.nvmlEventTypeXidCriticalError:
                for device in self._devices_of(event.device):
                    yield device, int(event.eventData)

    def _devices_of(self, handle: object) -> list[DeviceId]:
        try:
            uuid = self._library.nvml.nvmlDeviceGetUUID(handle)
        except self._library.nvml.NVMLError:
            return []  # it cannot be asked any more: then the queries find it lost
        return [device for device, gpu in self.gpus.items() if gpu == uuid]

    def uncorrected_ecc(self, device: DeviceId) -> int:
        """Uncorrected errors since the driver was loaded; 0 if the device does not count them."""
        library, handle = self._library, self._handle(device)
        kind = library.name("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", None)
        counter = library.name("NVML_VOLATILE_ECC", None)
        if kind is None or counter is None:
            return 0
        which = (handle, kind, counter)
        return int(library.ask("nvmlDeviceGetTotalEccErrors", *which, otherwise=0))

    def row_remapping(self, device: DeviceId) -> tuple[bool, bool]:
        """(pending, failed); both False where rows are not remapped, or with MIG instances."""
        handle = self._handle(device)
        rows = self._library.ask("nvmlDeviceGetRemappedRows", handle, otherwise=(0, 0, 0, 0))
        return bool(rows[2]), bool(rows[3])

    def recovery_action(self, device: DeviceId) -> int:
        """NVML_GPU_RECOVERY_ACTION_*; 0 where library or driver do not know the field."""
        library, handle = self._library, self._handle(device)
        wanted = library.name("NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
        if wanted is None:
            return 0
        asked = ("nvmlDeviceGetFieldValues", handle, [wanted])
        for field in library.ask(*asked, otherwise=_NO_FIELDS):
            if field.nvmlReturn == 0:  # NVML_SUCCESS
                return int(field.value.uiVal)
        return 0
