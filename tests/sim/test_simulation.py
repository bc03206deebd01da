"""Many seeds of the simulation, without a violation. A failing one names itself."""

import pytest

from revivemoe.sim.report import replay, run_seeds

CHUNK = 50
NUM_CHUNKS = 10


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_seeds_hold_every_invariant(chunk: int) -> None:
    tally = run_seeds(range(chunk * CHUNK, (chunk + 1) * CHUNK))
    broken = [f"seed {r.seed}: {r.violation}\n  {replay(r.seed)}" for r in tally.failing]
    assert not broken, "\n".join(broken)


def test_a_seed_replays_exactly() -> None:
    first, second = run_seeds([7]), run_seeds([7])
    assert first == second
