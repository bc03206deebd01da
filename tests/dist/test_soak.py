"""A soak of seven seconds, of one layout or the other: `make soak` is both for half an hour.

True command lines: a fork server that replaces one of the zygote's would not be as large as it.
"""

from pathlib import Path

import pytest
from support.cases import Weights

from revivemoe.bench.soak import prompts, report
from revivemoe.bench.soak.layouts import COLLOCATED, DISAGGREGATED
from revivemoe.bench.soak.load import Request
from revivemoe.bench.soak.prompts import screened_requests
from revivemoe.bench.soak.run import soak_layout
from revivemoe.bench.soak.setup import Setup
from revivemoe.bench.soak.soak import Soaked


@pytest.fixture(scope="module")
def requests(qwen: Weights) -> list[Request]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "OF_EACH_LENGTH", 3)
        patch.setattr(prompts, "OUTPUT_TOKENS", 48)
        return screened_requests(qwen.dir, 0)


@pytest.mark.timeout(240)
def test_a_few_faults_of_any_kind(
    qwen: Weights,
    requests: list[Request],
    chaos_seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a log that is kept
    layout = (COLLOCATED, DISAGGREGATED)[chaos_seed % 2]
    print(f"seed {chaos_seed}: {layout.name}")
    setup = Setup(minutes=0.12, every_s=(2.0, 3.0), seed=chaos_seed)
    soaked = Soaked(layout.name)
    soak_layout(setup, qwen.dir, layout, requests, soaked, print, tmp_path)
    assert report.violations([soaked]) == []
    assert soaked.episodes
    assert soaked.tally.done > len(requests)
