"""The control thread of a rank, over its real socket."""

import os
import secrets
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from unit.rank_specs import SPEC

from revivemoe.comm.fence import FenceFlag
from revivemoe.core.progress import Progress
from revivemoe.executor.control import ControlThread
from revivemoe.ids import Epoch
from revivemoe.messages.commands import Fence, Wake
from revivemoe.messages.reports import RankStats


@pytest.fixture
def lifeline() -> Iterator[int]:
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


def test_a_command_that_cannot_be_decoded_is_dropped_and_the_next_is_heard(
    lifeline: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    exited: list[int] = []
    monkeypatch.setattr(os, "_exit", exited.append)
    endpoint = f"ipc://@test-control-{secrets.token_hex(4)}"
    spec = msgspec.structs.replace(
        SPEC, commands=endpoint, reports=f"{endpoint}-reports", heartbeat_s=0.02
    )
    fence = FenceFlag()
    said = (lambda: (RankStats(), None), lambda report: None)
    control = ControlThread(spec, lifeline, fence, Progress(time.monotonic), *said)
    with zmq.Context() as context, context.socket(zmq.PUSH) as engine, control:
        engine.connect(endpoint)
        for garbage in (b"\xc1", b"", b"\x81\xa4type\xa7Unknown", b"\xdd\xff\xff\xff\xff"):
            engine.send(garbage)
        engine.send(msgspec.msgpack.encode(Wake(7)))
        engine.send(msgspec.msgpack.encode(Fence(Epoch(3))))
        assert control.commands.get(timeout=2.0) == Wake(7)
        assert control.commands.get(timeout=2.0) == Fence(Epoch(3))
        assert fence.epoch == 3
    assert not exited
    told = capfd.readouterr().err
    assert told.count("rank 3: commands that cannot be decoded: 1, the last: ") == 1
