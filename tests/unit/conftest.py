import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from revivemoe.checkpoint import ARCHS, make_model


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture."""
    root = tmp_path_factory.mktemp("models")
    for arch in ARCHS:
        make_model(root / arch, arch, "tiny", seed=0)
    return {arch: root / arch for arch in ARCHS}


@pytest.fixture(autouse=True)
def own_ctrl_c() -> Iterator[None]:
    """What the command line does to Ctrl-C is undone: it has a meaning for pytest too."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
