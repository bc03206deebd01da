from collections.abc import Iterator

import pytest
from unit.cluster.played import PlayedForkServer, playing


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedForkServer]:
    with playing(monkeypatch) as played:
        yield played
