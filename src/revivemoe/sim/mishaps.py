"""What may go wrong inside a simulated rank, as its step loop asks for it."""

from revivemoe.core.step import Batch
from revivemoe.sim.process import Process


class Mishaps:
    """Asked at each place where the world may break in. By itself everything goes well."""

    def load_fails(self, process: Process) -> bool:
        """Whether the load of an expert, or of the weights, fails here."""
        return False

    def load_is_silent(self, process: Process) -> bool:
        """Whether a load beside the steps, which begins here, is never answered."""
        return False

    def corrupts(self, process: Process, phase: str) -> bool:
        """Whether this work turns finite numbers into NaN."""
        return False

    def runs(self, process: Process, batch: Batch) -> None:
        """A forward begins with this batch. It may be the end of the process."""
