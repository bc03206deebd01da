"""What may go wrong inside a simulated rank, as its step loop asks for it."""

from typing import Protocol

from revivemoe.core.step import Batch
from revivemoe.sim.process import Process


class Mishaps(Protocol):
    """Asked at each place where the world may break in."""

    def load_fails(self, process: Process) -> bool:
        """Whether the load of an expert, or of the weights, fails here."""
        ...

    def corrupts(self, process: Process, phase: str) -> bool:
        """Whether this work turns finite numbers into NaN."""
        ...

    def runs(self, process: Process, batch: Batch) -> None:
        """A forward begins with this batch. It may be the end of the process."""
        ...


class NoMishaps:
    """Everything goes well."""

    def load_fails(self, process: Process) -> bool:
        return False

    def corrupts(self, process: Process, phase: str) -> bool:
        return False

    def runs(self, process: Process, batch: Batch) -> None:
        pass
