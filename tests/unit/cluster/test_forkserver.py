"""The real fork server, with ranks that only sleep: none goes on without a handle in the engine."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from unit.rank_specs import SPEC

from revivemoe.cluster.forkserver import MAX_MESSAGE, Exited, Launch, Launched, Reply, Unlaunched

PROGRAM = """
import os, signal, socket, sys, time
from pathlib import Path
from revivemoe.cluster.forkserver import ForkServer, Launched

def run_rank(spec, lifeline, segment_fd, cache_fd):
    Path(spec.model_dir).touch()
    time.sleep(60)

class Played(ForkServer):
    def _send(self, reply, fds):
        if isinstance(reply, Launched):
            print(reply.pid, flush=True)
            at_hand_over()
        super()._send(reply, fds)

def at_hand_over(): pass
{changed}
Played(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), None, None).run(run_rank)
"""


class Served:
    def __init__(self, went_on: Path, changed: str) -> None:
        self.went_on = went_on
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(5.0)
        lifeline, self._lifeline_write = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM.format(changed=changed)),
                *(str(theirs.fileno()), str(lifeline)),
            ],
            pass_fds=[theirs.fileno(), lifeline],
            stdout=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        os.close(lifeline)

    def launch(self, incarnation: int = 1) -> None:
        spec = msgspec.structs.replace(SPEC, incarnation=incarnation, model_dir=str(self.went_on))
        self.sock.send(msgspec.msgpack.encode(Launch(spec)))

    def forked(self) -> int:
        """The pid of a child that is not handed over yet."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def receive(self) -> tuple[Reply, list[int]]:
        raw, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE, 1)
        return msgspec.msgpack.decode(raw, type=Reply), fds

    def end_engine(self) -> None:
        os.close(self._lifeline_write)
        self._lifeline_write = -1

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.sock.close()
        if self._lifeline_write >= 0:
            self.end_engine()
        self.process.wait(5.0)


@contextmanager
def serving(tmp_path: Path, changed: str = "") -> Iterator[Served]:
    served = Served(tmp_path / "went on", changed)
    try:
        yield served
    finally:
        served.close()


def ends(pid: int) -> bool:
    """Within five seconds."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 5.0)[0])
    finally:
        os.close(pidfd)


SLOW = """
def at_hand_over():
    time.sleep(0.2)
    assert not Path({path!r}).exists(), "it went on"
"""


def test_a_child_goes_on_when_it_has_been_handed_over_and_not_before(tmp_path: Path) -> None:
    with serving(tmp_path, SLOW.format(path=str(tmp_path / "went on"))) as served:
        served.launch()
        reply, (pidfd,) = served.receive()
        assert reply == Launched(SPEC.rank, 1, served.forked())
        while not served.went_on.exists():
            assert not select.select([pidfd], [], [], 0.01)[0]
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert served.receive() == (Exited(SPEC.rank, 1, -signal.SIGKILL), [])
        os.close(pidfd)


def test_a_child_ends_with_a_fork_server_that_dies_before_it_is_handed_over(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "def at_hand_over(): os.kill(os.getpid(), signal.SIGKILL)") as served:
        served.launch()
        pid = served.forked()
        assert served.sock.recv(MAX_MESSAGE) == b""
        assert ends(pid)
        assert not served.went_on.exists()


def test_a_child_that_waits_to_be_handed_over_ends_with_the_engine(tmp_path: Path) -> None:
    with serving(tmp_path, "def at_hand_over(): os.kill(os.getpid(), signal.SIGSTOP)") as served:
        served.launch()
        pid = served.forked()
        served.end_engine()
        assert ends(pid)
        assert not served.went_on.exists()


FAILS_ONCE = """
really = os.{name}
def once(*arguments):
    os.{name} = really
    raise OSError("there are no more")
os.{name} = once
"""


@pytest.mark.parametrize("name", ["fork", "pidfd_open"])
def test_a_fork_that_fails_is_told_and_others_can_be_made(tmp_path: Path, name: str) -> None:
    with serving(tmp_path, FAILS_ONCE.format(name=name)) as served:
        served.launch()
        assert served.receive() == (Unlaunched(SPEC.rank, 1, "there are no more"), [])
        assert not served.went_on.exists()
        served.launch(2)
        reply, (pidfd,) = served.receive()
        assert isinstance(reply, Launched)
        assert reply.incarnation == 2
        os.close(pidfd)
