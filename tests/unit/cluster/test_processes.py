"""From the launch that was asked for to the exit that was told, with a played fork server."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from unit.cluster.played import PlayedForkServer, until, was_killed
from unit.rank_specs import SPEC

from revivemoe.cluster import processes as module
from revivemoe.cluster.forkserver import MAX_MESSAGE, Hail, Launched
from revivemoe.cluster.launcher import SPINS, Launcher, spinning
from revivemoe.cluster.oom import OomKiller
from revivemoe.cluster.processes import LOST, ProcessCallbacks, Processes
from revivemoe.ids import Incarnation, RankId

KEY = (RankId(0), Incarnation(1))
OTHER = (RankId(1), Incarnation(1))
GONE = ("fork server gone",)


class Host:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.processes = Processes(
            Launcher(None),
            ProcessCallbacks(
                lambda *told: self.told.append(("arrived", *told)),
                lambda *told: self.told.append(("exit", *told)),
                lambda: self.told.append(GONE),
            ),
        )

    def launch(self, key: tuple[RankId, Incarnation] = KEY, size: int = 0) -> None:
        """`size`: of the message at least, bytes."""
        me = {"rank": key[0], "incarnation": key[1], "model_dir": "x" * size}
        self.processes.launch(msgspec.structs.replace(SPEC, **me))

    @property
    def exits(self) -> list[tuple[object, ...]]:
        return [told for told in self.told if told[0] == "exit"]


@asynccontextmanager
async def started() -> AsyncIterator[Host]:
    host = Host()
    host.processes.start()
    try:
        yield host
    finally:
        await host.processes.close()


Played = Callable[[Host, PlayedForkServer], Coroutine[None, None, None]]


def play(played: PlayedForkServer, scene: Played) -> None:
    async def run() -> None:
        async with started() as host:
            await scene(host, played)

    asyncio.run(run())


async def asked(host: Host, played: PlayedForkServer) -> None:
    """The launch of KEY has been sent to a warm fork server."""
    host.launch()
    played.warm()
    await asyncio.to_thread(played.receive)


# ---- launches that have not arrived -----------------------------------------------------------


def test_who_is_killed_before_it_comes_is_killed_when_it_comes(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        host.processes.kill(KEY)
        host.processes.kill(KEY)
        process = played.fork()
        await until(lambda: host.told)
        assert was_killed(process)
        await until(lambda: host.exits)
        detail = f"process {process.pid}: killed by the engine"
        assert host.told == [("arrived", KEY, process.pid), ("exit", KEY, detail, False)]

    play(played, scene)


def test_who_is_killed_before_it_is_asked_for_is_not_asked_for(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        host.launch()
        host.launch(OTHER)
        host.processes.kill(KEY)
        assert not host.told, "who asks is not told of it meanwhile"
        await until(lambda: host.told)
        detail = "killed before its process was asked for"
        assert host.told == [("exit", KEY, detail, False)]
        played.warm()
        launch = await asyncio.to_thread(played.receive)
        assert not isinstance(launch, Hail)
        assert launch.spec.rank == OTHER[0]

    play(played, scene)


def test_what_has_not_come_when_the_fork_server_goes_never_will(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        played.die()
        await until(lambda: host.exits)
        assert host.told == [GONE, ("exit", KEY, LOST, False)]

    play(played, scene)


def test_a_fork_server_that_never_gets_warm_loses_what_waits(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        host.launch()
        host.launch(OTHER)
        played.die()
        await until(lambda: len(host.exits) == 2)
        assert host.told == [GONE, ("exit", KEY, LOST, False), ("exit", OTHER, LOST, False)]

    play(played, scene)


def test_what_it_said_before_it_went_counts_though_it_left_something_unread(
    played: PlayedForkServer,
) -> None:
    """The kernel reports a reset first. Taken for the end, it would leave a process on its own."""

    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        host.launch(OTHER)
        process = played.fork()
        played.die()
        await until(lambda: host.exits)
        arrived = ("arrived", KEY, process.pid)
        assert host.told == [arrived, GONE, ("exit", OTHER, LOST, False)]
        host.processes.kill(KEY)
        assert was_killed(process)

    play(played, scene)


def test_a_launch_that_a_dead_fork_server_cannot_be_asked_for_is_told(
    played: PlayedForkServer,
) -> None:
    """It has died, and that has not been read yet."""

    async def scene(host: Host, played: PlayedForkServer) -> None:
        played.warm()
        await until(lambda: host.processes._warm)
        played.die()
        host.launch()
        await until(lambda: host.exits)
        assert host.told == [GONE, ("exit", KEY, LOST, False)]

    play(played, scene)


def test_after_the_fork_server_has_gone_a_launch_starts_another(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        played.die()
        await until(lambda: host.exits)
        host.launch(OTHER)
        assert played.starts == 2
        played.warm()
        process = played.fork(*OTHER)
        await until(lambda: host.told[-1] == ("arrived", OTHER, process.pid))

    play(played, scene)


def test_if_no_other_can_be_started_the_launch_is_told_as_an_exit(
    played: PlayedForkServer,
) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        played.die()
        await until(lambda: host.told)
        for incarnation in (1, 2):  # again and again
            played.start_error = OSError("no more processes")
            key = (RankId(0), Incarnation(incarnation))
            host.launch(key)
            await until(lambda: len(host.exits) == incarnation)  # noqa: B023
            detail = "the fork server could not be started: no more processes"
            assert host.told[-1] == ("exit", key, detail, False)

    play(played, scene)


def test_a_fork_that_fails_is_told_as_an_exit(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        played.refuse(*KEY, "no more processes")
        await until(lambda: host.told)
        detail = "it could not be forked: no more processes"
        assert host.told == [("exit", KEY, detail, False)]

    play(played, scene)


def test_a_process_whose_handle_got_lost_does_not_live_on(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        process = played.fork(*OTHER)  # in its stead, one without
        host.told.clear()
        played.send(Launched(*KEY, process.pid))
        await until(lambda: host.exits)
        assert host.exits == [("exit", KEY, "its process came without a handle", False)]
        assert was_killed(process)

    play(played, scene)


def test_launches_wait_for_a_fork_server_that_does_not_read(played: PlayedForkServer) -> None:
    many = 100

    async def scene(host: Host, played: PlayedForkServer) -> None:
        played.warm()
        await until(lambda: host.processes._warm)
        for incarnation in range(1, many + 1):
            host.launch((RankId(0), Incarnation(incarnation)), MAX_MESSAGE // 10)
        for incarnation in range(1, many + 1):
            launch = await asyncio.to_thread(played.receive)
            assert not isinstance(launch, Hail)
            assert launch.spec.incarnation == incarnation
        assert not host.told

    play(played, scene)


def test_a_launch_that_cannot_be_said_is_told_as_an_exit(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        played.warm()
        await until(lambda: host.processes._warm)
        host.launch(KEY, 10 * MAX_MESSAGE)
        assert not host.told
        await until(lambda: host.told)
        ((_, key, detail, by_itself),) = host.told
        assert (key, by_itself) == (KEY, False)
        assert str(detail).startswith("the fork server could not be asked: ")

    play(played, scene)


def test_a_fork_server_that_does_not_answer_is_replaced(
    played: PlayedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_WITHIN_S", 0.05)

    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        process = played.fork()
        await until(lambda: host.told)
        host.launch(OTHER)
        await until(lambda: host.exits)
        arrived = ("arrived", KEY, process.pid)
        assert host.told == [arrived, GONE, ("exit", OTHER, LOST, False)]
        assert process.poll() is None, "ranks live on"

    play(played, scene)


def test_a_fork_server_that_does_not_get_warm_is_replaced_and_a_warm_one_is_not(
    played: PlayedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WARM_WITHIN_S", 0.1)

    async def scene(host: Host, played: PlayedForkServer) -> None:
        host.launch()
        await until(lambda: host.exits)
        assert host.told == [GONE, ("exit", KEY, LOST, False)]
        host.launch(OTHER)
        played.warm()
        await asyncio.to_thread(played.receive)
        await asyncio.sleep(0.3)
        assert host.told.count(GONE) == 1, "neither by its own clock nor by that of the last one"

    play(played, scene)


def test_the_clock_of_a_fork_server_that_has_gone_is_not_that_of_the_next(
    played: PlayedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WARM_WITHIN_S", 0.4)

    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asyncio.sleep(0.3)
        played.die()
        await until(lambda: host.told == [GONE])
        host.launch()
        await asyncio.sleep(0.25)
        assert host.told == [GONE]

    play(played, scene)


# ---- how they end -----------------------------------------------------------------------------


def test_a_process_may_be_killed_any_number_of_times(played: PlayedForkServer) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        process = played.fork()
        await until(lambda: host.told)
        assert host.processes.pid(KEY) == process.pid
        for _ in range(3):
            host.processes.kill(KEY)
        assert was_killed(process)
        host.processes.kill(KEY)  # it is reaped
        await until(lambda: host.exits)
        host.processes.kill(KEY)  # its pidfd is closed
        assert host.processes.pid(KEY) is None
        played.tell_exit(-signal.SIGKILL)  # late
        played.die()
        await until(lambda: host.told[-1] == GONE)
        detail = f"process {process.pid}: killed by the engine"
        assert host.exits == [("exit", KEY, detail, False)]

    play(played, scene)


@pytest.mark.parametrize(
    ("status", "how", "by_itself"),
    [
        (-signal.SIGKILL, "killed by SIGKILL", False),
        (-signal.SIGSEGV, "killed by SIGSEGV", True),
        (-40, "killed by signal 40", False),
        (1, "exit status 1", True),
        (None, "how it ended is not known", True),
    ],
)
def test_an_exit_is_told_with_its_status_or_without(
    played: PlayedForkServer, status: int | None, how: str, by_itself: bool
) -> None:
    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        process = played.fork()
        await until(lambda: host.told)
        process.kill()
        if status is not None:
            played.tell_exit(status)
        await until(lambda: host.exits)
        assert host.exits == [("exit", KEY, f"process {process.pid}: {how}", by_itself)]

    play(played, scene)


@pytest.mark.parametrize("another", [False, True], ids=["without one", "with another"])
def test_once_its_fork_server_is_gone_nobody_tells_how_it_ended(
    played: PlayedForkServer, another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STATUS_WAIT_S", 60.0)

    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        process = played.fork()
        await until(lambda: host.told)
        played.die()
        await until(lambda: GONE in host.told)
        if another:
            host.launch(OTHER)
        process.kill()
        await until(lambda: host.exits)
        detail = f"process {process.pid}: how it ended is not known"
        assert host.exits == [("exit", KEY, detail, True)]

    play(played, scene)


def test_the_out_of_memory_killer_is_told_from_others_that_kill(
    played: PlayedForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 1\n")
    monkeypatch.setattr(module, "counters", lambda: [counter])

    async def scene(host: Host, played: PlayedForkServer) -> None:
        await asked(host, played)
        host.launch(OTHER)
        ours, kernels = played.fork(*OTHER), played.fork()
        await until(lambda: len(host.told) == 2)
        counter.write_text("oom_kill 2\n")
        kernels.kill()
        host.processes.kill(OTHER)
        for key in (KEY, OTHER):
            played.tell_exit(-signal.SIGKILL, *key)
        await until(lambda: len(host.exits) == 2)
        detail = "killed by SIGKILL: the kernel's out-of-memory killer"
        assert sorted(host.exits) == [
            ("exit", KEY, f"process {kernels.pid}: {detail}", True),
            ("exit", OTHER, f"process {ours.pid}: killed by SIGKILL", False),
        ]

    play(played, scene)


def test_closing_ends_all_and_tells_nothing(played: PlayedForkServer) -> None:
    async def run() -> None:
        async with started() as host:
            await asked(host, played)
            played.fork()
            await until(lambda: host.told)
        assert was_killed(played.processes[0])
        assert not host.exits

    asyncio.run(run())


def test_the_counters_of_this_host_can_be_read() -> None:
    assert not OomKiller(module.counters()).struck(0.0)


def test_spinning_is_bounded_unless_somebody_says_something_about_it() -> None:
    assert spinning({"A": "b"}) == {"A": "b", "GOMP_SPINCOUNT": SPINS}
    for said in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}):
        assert spinning(said) == said
