"""A model that memory cannot hold is refused before it is loaded."""

import json
from pathlib import Path

import pytest

from revivemoe.host.memory import Limit
from revivemoe.serving.memory import INDEX, MIB, check, stored_bytes

GROUP = Path("/sys/fs/cgroup/memory.max")


def test_weights_and_processes_must_fit() -> None:
    processes = 512 + 2 * 64
    check(Limit(GROUP, (processes + 101) * MIB, 0), 100 * MIB, 2)
    with pytest.raises(ValueError, match=r"^740 MiB of memory \(/sys/fs/cgroup/memory.max\)"):
        check(Limit(GROUP, (processes + 100) * MIB, 0), 100 * MIB, 2)


def test_how_much_is_stored(tmp_path: Path) -> None:
    assert stored_bytes(tmp_path) == 0
    for text, told in (("", 0), ("[]", 0), ("{}", 0), ('{"metadata": {"total_size": null}}', 0)):
        (tmp_path / INDEX).write_text(text)
        assert stored_bytes(tmp_path) == told, text
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 70.0}}))
    assert stored_bytes(tmp_path) == 70
    (tmp_path / "model.safetensors").write_bytes(bytes(9))
    assert stored_bytes(tmp_path) == 9
