"""The deployments that are soaked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLICY = """
[limits]
max_recoveries = 100000
max_restarts = 100000
[rejoin]
after_s = 1.0
settled_after_s = 0.5
"""
"""A supervisor's limits and patience would end a soak, or slow it down: it brings about more in an
hour than a year does."""


@dataclass(frozen=True)
class Layout:
    """Attention ranks come first; `experts` 0: all ranks have both roles."""

    name: str
    attention: int
    experts: int
    replicas: int
    """Ranks that hold each expert."""
    backend: str = "auto"

    @property
    def ranks(self) -> range:
        return range(self.attention + self.experts)

    @property
    def attention_ranks(self) -> range:
        return range(self.attention)

    @property
    def expert_ranks(self) -> range:
        return self.ranks[self.attention :] if self.experts else self.ranks

    def flags(self, num_experts: int, policy: Path) -> list[str]:
        """Of `revivemoe serve`."""
        return [
            "--data-parallel-size", str(self.attention), "--expert-ranks", str(self.experts),
            "--redundant-experts", str((self.replicas - 1) * num_experts),
            "--comm-backend", self.backend, "--device", "cpu", "--dtype", "float32",
            "--max-model-len", "512", "--enable-fault-injection", "--recovery-policy", str(policy),
        ]  # fmt: skip


COLLOCATED = Layout("collocated", 4, 0, replicas=3)
DISAGGREGATED = Layout("disaggregated", 3, 2, replicas=2)
NAMES = ("collocated", "disaggregated", "both")


def layouts(name: str) -> Sequence[Layout]:
    """Those that one of `NAMES` means."""
    return [one for one in (COLLOCATED, DISAGGREGATED) if name in (one.name, "both")]
