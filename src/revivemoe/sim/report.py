"""Runs many seeds and says what was covered."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from revivemoe.sim.run import Result, run_seed


@dataclass
class Tally:
    seeds: int = 0
    failing: list[Result] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults that struck, by kind and by the stage they struck in."""
    steps: int = 0
    preemptions: int = 0
    virtual_s: float = 0.0

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.outcomes[result.outcome] += 1
        self.coverage.update((fault.kind, stage) for fault, stage in result.struck)
        self.steps += result.num_steps
        self.preemptions += result.preemptions
        self.virtual_s += result.virtual_s
        if result.violation is not None:
            self.failing.append(result)


def run_seeds(seeds: Iterable[int], on_result: Callable[[Result], None] = lambda r: None) -> Tally:
    """Run all of them, failing ones included."""
    tally = Tally()
    for seed in seeds:
        result = run_seed(seed)
        tally.add(result)
        on_result(result)
    return tally


def replay(seed: int) -> str:
    """The command that runs one seed again."""
    return f"revivemoe sim --seed {seed} --seeds 1 --verbose"
