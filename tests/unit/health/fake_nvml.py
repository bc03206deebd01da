"""A stand-in for the module `pynvml`: its names, its signatures, its errors.

`test_nvml.test_the_fake_has_the_names_of_the_real_one` holds it to the installed module.
"""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

NVML_SUCCESS = 0
NVML_ERROR_NOT_SUPPORTED = 3
NVML_VOLATILE_ECC = 0
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
nvmlEventTypeXidCriticalError = 8


class NVMLError(Exception): ...


class NVMLError_NotSupported(NVMLError): ...


class NVMLError_NotFound(NVMLError): ...


class NVMLError_GpuNotFound(NVMLError): ...


class NVMLError_GpuIsLost(NVMLError): ...


class NVMLError_ResetRequired(NVMLError): ...


class NVMLError_FunctionNotFound(NVMLError): ...


class NVMLError_Timeout(NVMLError): ...


class NVMLError_Unknown(NVMLError): ...


class NVMLError_LibraryNotFound(NVMLError): ...


class NVMLError_InvalidArgument(NVMLError): ...


@dataclass(eq=False)
class Gpu:
    """One device, and what its next queries say. It is its own handle."""

    uuid: str
    ecc: int = 0
    pending: int = 0
    failed: int = 0
    action: int = 0
    error: NVMLError | None = None
    """Raised by every query of it."""
    lacks: set[str] = field(default_factory=set)
    """Functions that it does not support."""
    old_driver: set[str] = field(default_factory=set)
    """Functions that the driver lacks."""
    register_error: NVMLError | None = None
    """Raised where its events are asked for."""

    def asked(self, what: str) -> None:
        if self.error is not None:
            raise self.error
        if what in self.lacks:
            raise NVMLError_NotSupported()
        if what in self.old_driver:
            raise NVMLError_FunctionNotFound()


@dataclass(frozen=True)
class Part:
    """A MIG instance of a GPU. It is its own handle."""

    uuid: str
    gpu: Gpu


class FakeNvml:
    """The module. Attributes that are not functions are those above."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = gpus
        self.opened = 0
        self.sets: list[set[str]] = []
        """UUIDs registered with each living event set."""
        self.queue: deque[SimpleNamespace] = deque()
        self.waits_ms: list[int] = []
        self.parts: tuple[Part, ...] = ()
        self.wait_error: NVMLError | None = None
        """Raised by a wait for events once none is queued."""
        self.create_error: NVMLError | None = None
        """Raised where an event set is asked for."""
        self.no_driver = False
        self.absent: set[str] = set()
        """Names that this version of the module lacks."""

    def __getattribute__(self, name: str) -> object:
        if name in object.__getattribute__(self, "__dict__").get("absent", ()):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> object:
        if name in self.absent or name not in globals():
            raise AttributeError(name)
        return globals()[name]

    def xid(self, gpu: Gpu, xid: int) -> None:
        self.queue.append(
            SimpleNamespace(
                device=gpu,
                eventType=nvmlEventTypeXidCriticalError,
                eventData=xid,
                gpuInstanceId=0xFFFFFFFF,
                computeInstanceId=0xFFFFFFFF,
            )
        )

    # ---- the library's functions

    def nvmlInit(self) -> None:
        if self.no_driver:
            raise NVMLError_LibraryNotFound()
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if index >= len(self.gpus):
            raise NVMLError_InvalidArgument()
        self.gpus[index].asked("nvmlDeviceGetHandleByIndex")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu | Part:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                gpu.asked("nvmlDeviceGetHandleByUUID")
                return gpu
        for part in self.parts:
            if part.uuid == uuid:
                return part
        raise NVMLError_NotFound()

    def nvmlDeviceIsMigDeviceHandle(self, device: Gpu | Part) -> int:
        return int(isinstance(device, Part))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: Part) -> Gpu:
        return migDevice.gpu

    def nvmlDeviceGetUUID(self, handle: Gpu) -> str:
        handle.asked("nvmlDeviceGetUUID")
        return handle.uuid

    def nvmlEventSetCreate(self) -> set[str]:
        if self.create_error is not None:
            raise self.create_error
        self.sets.append(set())
        return self.sets[-1]

    def nvmlEventSetFree(self, eventSet: set[str]) -> None:
        """What is queued of its devices goes with it."""
        self.sets.remove(eventSet)
        self.queue = deque(e for e in self.queue if e.device.uuid not in eventSet)

    def nvmlDeviceRegisterEvents(
        self,
        handle: Gpu,
        eventTypes: int,
        eventSet: set[str],
    ) -> None:
        handle.asked("nvmlDeviceRegisterEvents")
        if handle.register_error is not None:
            raise handle.register_error
        assert eventTypes == nvmlEventTypeXidCriticalError
        assert handle.uuid not in eventSet, "registered twice"
        eventSet.add(handle.uuid)

    def nvmlEventSetWait_v2(self, eventSet: set[str], timeoutms: int) -> SimpleNamespace:
        """For the whole set it says that one of its devices is lost."""
        self.waits_ms.append(timeoutms)
        for gpu in self.gpus:
            if gpu.uuid in eventSet and isinstance(gpu.error, NVMLError_GpuIsLost):
                raise gpu.error
        if not self.queue:
            raise self.wait_error or NVMLError_Timeout()
        event = self.queue.popleft()
        assert event.device.uuid in eventSet, "an event of a device that was not registered"
        return event

    def nvmlEventSetWait(self, eventSet: set[str], timeoutms: int) -> SimpleNamespace:
        return FakeNvml.nvmlEventSetWait_v2(self, eventSet, timeoutms)

    def nvmlDeviceGetTotalEccErrors(self, handle: Gpu, errorType: int, counterType: int) -> int:
        handle.asked("nvmlDeviceGetTotalEccErrors")
        assert (errorType, counterType) == (NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC)
        return handle.ecc

    def nvmlDeviceGetRemappedRows(self, device: Gpu) -> tuple[int, int, int, int]:
        device.asked("nvmlDeviceGetRemappedRows")
        return 0, 0, device.pending, device.failed

    def nvmlDeviceGetFieldValues(self, handle: Gpu, fieldIds: list[int]) -> list[SimpleNamespace]:
        """A field that is not supported is said so in the answer, not raised."""
        if handle.error is not None:
            raise handle.error
        assert fieldIds == [NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        known = "nvmlDeviceGetFieldValues" not in handle.lacks
        return [
            SimpleNamespace(
                nvmlReturn=NVML_SUCCESS if known else NVML_ERROR_NOT_SUPPORTED,
                value=SimpleNamespace(uiVal=handle.action if known else 1),
            )
        ]
