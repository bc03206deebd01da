"""One instance of two ranks for all clients, with keys."""

from collections.abc import Iterator

import pytest
from support.deployment import deployed
from support.served import ADMIN_KEY, KEY, PYTHON, Served
from support.warm import Zygote

from revivemoe.checkpoint.make import make_model

MODEL = "tiny-moe"
MAX_LEN = 2048


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, warm: Zygote) -> Iterator[Served]:
    model_dir = tmp_path_factory.mktemp("checkpoints") / MODEL
    make_model(model_dir, "qwen3_moe", "tiny", 0)
    keys = ["--api-key", KEY, "--admin-api-key", ADMIN_KEY]
    with deployed(model_dir, 2, "--max-model-len", str(MAX_LEN), *keys) as deployment:
        yield Served(deployment, MODEL, model_dir)


@pytest.fixture(scope="session")
def libraries() -> None:
    """Clients that are Python's."""
    if not PYTHON.exists():
        pytest.skip("the clients are missing: make test-clients")
