"""Checkpoints and requests that the whole session shares; the seed of what is random."""

import random
from collections.abc import Callable
from functools import cache

import pytest
from support.cases import Case, Weights, mixed_cases
from support.warm import Zygote

from revivemoe.checkpoint.make import make_model

LONGEST = ("matrix", "lifecycle", "detection", "soak", "return", "disaggregated", "masking")
"""Of two workers neither should begin with one of these when the other has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    last = len(LONGEST)
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, last))


@pytest.fixture(autouse=True)
def processes(warm: Zygote) -> None:
    """All of these tests start some."""


@pytest.fixture(scope="session")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Weights]:
    """A tiny checkpoint of an architecture; made and loaded once."""

    @cache
    def weights(arch: str) -> Weights:
        model_dir = tmp_path_factory.mktemp("checkpoints") / arch
        make_model(model_dir, arch, "tiny", 0)
        return Weights(model_dir)

    return weights


@pytest.fixture(scope="session")
def qwen(weights_of: Callable[[str], Weights]) -> Weights:
    return weights_of("qwen3_moe")


@pytest.fixture(scope="session")
def mixed(qwen: Weights) -> list[Case]:
    """One request of every kind."""
    return mixed_cases(qwen)


@pytest.fixture
def chaos_seed() -> int:
    """Decides when faults strike; another one in every run, named by what fails."""
    return random.SystemRandom().randrange(1 << 32)
