"""The zygote, which tests of real processes fork theirs from, belongs to the whole session."""

import pytest
import torch
from hypothesis import settings
from support.warm import Zygote, zygote

from revivemoe.cluster.compiler import provide_kernels
from revivemoe.kernels.library import NoKernels
from revivemoe.kernels.native import Native

# Tiny models gain nothing from more, and threads that wait for each other suffer beside busy ranks.
torch.set_num_threads(1)
provide_kernels()  # as a fork server does for its ranks
# A machine that is busy with something else proves nothing about an example.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_finish(session: pytest.Session) -> None:
    """It imports for seconds, beside the tests that come first: begin at once, if it is needed."""
    if session.config.option.collectonly:
        return
    if any("warm" in getattr(item, "fixturenames", ()) for item in session.items):
        zygote()


@pytest.fixture(scope="session")
def warm() -> Zygote:
    return zygote()


@pytest.fixture(scope="session")
def native() -> Native:
    try:
        return Native()
    except NoKernels as error:
        pytest.skip(f"no kernels: {error}")


def pytest_sessionfinish() -> None:
    if zygote.cache_info().currsize:
        zygote().close()
