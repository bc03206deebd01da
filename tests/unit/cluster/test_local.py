"""What the engine is told, whatever comes over the sockets and whatever it makes of it."""

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine

import msgspec
import pytest
import zmq
from unit.cluster.played import PlayedForkServer, until
from unit.rank_specs import SPEC

from revivemoe.cluster.local import Callbacks, LocalCluster
from revivemoe.executor.spec import RankSpec
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import Hello, Report

ME, FIRST = RankId(0), Incarnation(1)
GARBAGE = (b"", b"\xc1", b"\x81\xa4type\xa7Unknown", b"\xdd\xff\xff\xff\xff", b"\xff" * 1000)


def hello(pid: int) -> Hello:
    return Hello(ME, FIRST, pid, "here")


def spec_for(rank: RankId, incarnation: Incarnation, slots: object) -> RankSpec:
    return msgspec.structs.replace(SPEC, rank=rank, incarnation=incarnation)


class Host:
    """Takes what it is told."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.exits: list[tuple[object, ...]] = []
        self.calls: list[str] = []
        self.cluster = LocalCluster(
            spec_for,
            None,
            "shm",
            Callbacks(self.on_report, self.on_arrived, self.on_exit, self.on_forkserver_gone),
        )

    def on_report(self, report: Report) -> None:
        self.reports.append(report)

    def on_arrived(self, *told: object) -> None:
        self.calls.append("arrived")

    def on_exit(self, *told: object) -> None:
        self.exits.append(told)

    def on_forkserver_gone(self) -> None:
        self.calls.append("gone")


Scene = Callable[[Host, "zmq.Socket[bytes]"], Coroutine[None, None, None]]


def play(scene: Scene) -> Host:
    async def run() -> Host:
        host = Host()
        async with host.cluster:
            with zmq.Context() as context, context.socket(zmq.PUSH) as rank:
                rank.connect(host.cluster.reports)
                await scene(host, rank)
        return host

    return asyncio.run(run())


def test_garbage_is_dropped_and_what_is_behind_it_is_taken(
    played: PlayedForkServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(host: Host, rank: "zmq.Socket[bytes]") -> None:
        for k, garbage in enumerate(GARBAGE):
            rank.send(garbage)
            rank.send(msgspec.msgpack.encode(hello(k)))
        await until(lambda: len(host.reports) == len(GARBAGE))

    host = play(scene)
    assert host.reports == [hello(k) for k in range(len(GARBAGE))]
    assert host.cluster.garbled == len(GARBAGE)
    (line,) = [r for r in caplog.records if "decoded" in r.message]
    assert line.levelno == logging.WARNING
    assert line.message.startswith("messages of ranks that cannot be decoded: 1, the last: ")


def test_every_launch_is_told_of_until_its_exit(played: PlayedForkServer) -> None:
    async def scene(host: Host, rank: "zmq.Socket[bytes]") -> None:
        cluster = host.cluster
        for incarnation in (1, 2, 3):
            cluster.launch(RankId(incarnation), Incarnation(incarnation), ())
        played.warm()
        for _ in range(3):
            await asyncio.to_thread(played.receive)
        process = played.fork(1, 1)
        await until(lambda: host.calls == ["arrived"])
        assert cluster.pid(RankId(1)) == process.pid
        assert cluster.living == 1
        played.die()
        await until(lambda: len(host.exits) == 2)
        cluster.kill(RankId(1))
        await until(lambda: len(host.exits) == 3)
        assert [told[0] for told in host.exits] == [2, 3, 1]
        assert host.calls == ["arrived", "gone"]
        for rank_id in (1, 2, 3):
            cluster.kill(RankId(rank_id))
            assert cluster.pid(RankId(rank_id)) is None

    play(scene)


def test_a_launch_without_a_socket_for_it_is_told_as_an_exit(
    played: PlayedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    async def scene(host: Host, rank: "zmq.Socket[bytes]") -> None:
        with monkeypatch.context() as patched:
            patched.setattr(zmq.Context, "socket", refuse)
            host.cluster.launch(ME, FIRST, ())
        host.cluster.kill(ME)
        await until(lambda: host.exits)
        detail = "no socket for its commands: Too many open files"
        assert host.exits == [(ME, FIRST, detail, False)]

    play(scene)
