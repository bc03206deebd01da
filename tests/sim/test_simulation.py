"""Many seeds of the simulation, without a violation. A failing one names itself."""

import pytest

from revivemoe.sim.faults import FaultKind
from revivemoe.sim.report import replay, run_seeds
from revivemoe.sim.run import run_seed

CHUNK = 20
NUM_CHUNKS = 6


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_seeds_hold_every_invariant(chunk: int) -> None:
    tally = run_seeds(range(chunk * CHUNK, (chunk + 1) * CHUNK))
    broken = [f"seed {r.seed}: {r.violation}\n  {replay(r.seed)}" for r in tally.failing]
    assert not broken, "\n".join(broken)


ROLE_FAULTS: tuple[FaultKind, ...] = (
    "kill", "kill-two", "switch", "kill-switching", "load-fails", "drain", "rejoin", "hang",
)  # fmt: skip


def test_role_switches_and_faults_in_the_middle_of_them() -> None:
    """Donors die, loads fail, other expert ranks die: in the foreground and in the background."""
    results = [run_seed(seed, ROLE_FAULTS) for seed in range(45)]
    broken = [f"seed {r.seed}: {r.violation}" for r in results if r.violation]
    assert not broken, "\n".join(broken)
    switching = sum(stage == "switching" for r in results for _, stage in r.struck)
    assert switching >= 5, "faults must have struck while a rank was switching roles"


def test_a_seed_replays_exactly() -> None:
    first, second = run_seeds([7]), run_seeds([7])
    assert first == second
