"""A soak of two minutes: `make soak` is the same for thirty."""

from pathlib import Path

import pytest
from support.cases import Weights
from support.deployment import Deployment

from revivemoe.bench.soak import report
from revivemoe.bench.soak.layouts import COLLOCATED, DISAGGREGATED, Layout
from revivemoe.bench.soak.prompts import screened_requests
from revivemoe.bench.soak.run import soak_layout
from revivemoe.bench.soak.setup import Setup
from revivemoe.bench.soak.soak import Soaked

FEWEST_FAULTS = 3
"""In a minute, even on a machine that does something else as well."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", [COLLOCATED, DISAGGREGATED], ids=lambda one: one.name)
def test_not_quite_a_minute_of_faults(
    qwen: Weights,
    layout: Layout,
    chaos_seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a log that is kept
    print(f"seed {chaos_seed}")
    setup = Setup(minutes=0.8, every_s=(5.0, 8.0), seed=chaos_seed)
    requests, soaked = screened_requests(qwen.dir, chaos_seed), Soaked(layout.name)
    soak_layout(setup, qwen.dir, layout, requests, soaked, print, tmp_path, Deployment)
    assert report.violations([soaked]) == []
    assert len(soaked.episodes) >= FEWEST_FAULTS
    assert soaked.tally.done > len(requests)
