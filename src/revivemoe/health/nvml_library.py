"""The module `pynvml`, of whatever age: which names it has, and which device a name means.

`nvidia-ml-py` has the names of the header that it was made from, and the driver of the host may be
older than that: either may lack what the other one knows.
"""

import re
from types import ModuleType
from typing import Any

DeviceId = int | str
"""NVML's index of a device, or its UUID (`GPU-...`), which may be cut short as CUDA allows."""
GPU_UUID = re.compile("GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
MIG_OF_GPU = re.compile(f"MIG-({GPU_UUID.pattern})/[0-9]+/[0-9]+", re.IGNORECASE)
"""How a MIG instance was named before it had a UUID of its own."""
Errors = tuple[type[Exception], ...]


class Unknown(LookupError):
    """No device, or more than one, goes by this name."""


class Library:
    """Asks the module for what it has."""

    def __init__(self, nvml: ModuleType) -> None:
        self.nvml = nvml
        self.lost = self._errors("GpuIsLost", "GpuNotFound", "NotFound")
        """What it raises for a device that is gone."""
        self.reset_required = self._errors("ResetRequired")
        self.timeout = self._errors("Timeout")
        self._unsupported = self._errors("NotSupported", "FunctionNotFound", "InvalidArgument")
        """Of the device (a MIG instance has no events), or of a driver that lacks the function."""
        self._no_such_index = self._errors("InvalidArgument")
        newer = self.name("nvmlEventSetWait_v2", None) is not None
        self.event_wait = "nvmlEventSetWait_v2" if newer else "nvmlEventSetWait"

    def _errors(self, *names: str) -> Errors:
        found = (getattr(self.nvml, f"NVMLError_{name}", None) for name in names)
        return tuple(error for error in found if error is not None)

    def name(self, name: str, otherwise: Any) -> Any:
        """A constant or function of the module."""
        return getattr(self.nvml, name, otherwise)

    def ask(self, query: str, *args: object, otherwise: Any) -> Any:
        """`otherwise` where the library, the driver or the device does not know the query."""
        function = self.name(query, None)
        if function is None:
            return otherwise
        try:
            return function(*args)
        except self._unsupported:
            return otherwise

    def find(self, device: DeviceId) -> object:
        """Its handle. Raises Unknown, or what the library raises for a device that is lost."""
        if isinstance(device, int):
            try:
                return self.nvml.nvmlDeviceGetHandleByIndex(device)
            except self._no_such_index:
                raise Unknown(f"NVML has no device {device}") from None
        if match := MIG_OF_GPU.fullmatch(device):
            device = match[1]
        try:
            return self._physical(self.nvml.nvmlDeviceGetHandleByUUID(device))
        except self.lost:
            if GPU_UUID.fullmatch(device):
                raise
        except self._no_such_index:
            pass
        return self._find_by_prefix(device)

    def _physical(self, handle: object) -> object:
        """Of a MIG instance the GPU that it is on: errors are counted there."""
        if self.ask("nvmlDeviceIsMigDeviceHandle", handle, otherwise=0):
            return self.ask(
                "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, otherwise=handle
            )
        return handle

    def _find_by_prefix(self, prefix: str) -> object:
        """CUDA takes the beginning of a UUID that tells the device; NVML does not."""
        found = []
        for index in range(self.ask("nvmlDeviceGetCount", otherwise=0)):
            try:
                handle = self.nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = str(self.nvml.nvmlDeviceGetUUID(handle))
            except self.nvml.NVMLError:  # another's: lost, or not for us to see
                continue
            if uuid.lower().startswith(prefix.lower()):
                found.append(handle)
        if len(found) != 1:
            raise Unknown(f"{len(found)} devices of NVML have a UUID that begins so")
        return found[0]
