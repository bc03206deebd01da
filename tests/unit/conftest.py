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
