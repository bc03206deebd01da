"""A model that memory cannot hold is refused before it is loaded."""

from pathlib import Path

import pytest

from revivemoe.host.memory import Limit
from revivemoe.serving.memory import MIB, check

GROUP = Path("/sys/fs/cgroup/memory.max")


def test_weights_and_processes_must_fit() -> None:
    processes = 512 + 2 * 64
    check(Limit(GROUP, (processes + 101) * MIB, 0), 100 * MIB, 2)
    with pytest.raises(ValueError, match=r"^740 MiB of memory \(/sys/fs/cgroup/memory.max\)"):
        check(Limit(GROUP, (processes + 100) * MIB, 0), 100 * MIB, 2)
