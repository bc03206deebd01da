"""What an exit status says about who is to blame."""

import signal

import pytest

from revivemoe.cluster.exits import Ending, describe_status, ending

OOM = "killed by SIGKILL: the kernel's out-of-memory killer"


@pytest.mark.parametrize(
    ("status", "killed_by_us", "oom_struck", "expected"),
    [
        (0, False, False, Ending("exit status 0", False)),
        (3, False, True, Ending("exit status 3", True)),
        (-signal.SIGSEGV, True, False, Ending("killed by SIGSEGV", True)),
        (-signal.SIGTERM, False, True, Ending("killed by SIGTERM", False)),
        (-signal.SIGKILL, False, False, Ending("killed by SIGKILL", False)),
        (-signal.SIGKILL, False, True, Ending(OOM, True)),
        (-signal.SIGKILL, True, True, Ending("killed by SIGKILL", False)),
        (None, False, False, Ending("how it ended is not known", True)),
        (None, True, True, Ending("killed by the engine", False)),
    ],
)
def test_how_a_process_ended(
    status: int | None, killed_by_us: bool, oom_struck: bool, expected: Ending
) -> None:
    assert ending(status, killed_by_us, oom_struck) == expected


def test_signals_without_a_name_are_described_too() -> None:
    assert describe_status(-40) == "killed by signal 40"
