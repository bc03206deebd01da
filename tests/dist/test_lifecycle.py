"""Beginning and end of an instance: whatever ends it, nothing of it is left."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file
from support.warm import ForkedServer, zygote

from revivemoe.bench import plain_http
from revivemoe.bench.loadgen import StreamResult, stream_all
from revivemoe.checkpoint.make import make_model

ENDED_WITHIN_S = 5.0
KILLED_WITHIN_S = 3.0
IDLE_CORE_SHARE = 0.05
START_S = 60.0

Process = subprocess.Popen[bytes] | ForkedServer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lifecycle") / "model"
    make_model(path, "qwen3_moe", "tiny", 0)
    return path


@dataclass
class Served:
    """A `revivemoe serve` with everything it writes and every process it starts on record."""

    process: Process
    folder: Path
    url: str = ""
    family: dict[int, psutil.Process] = field(default_factory=dict)
    """Every process of it that was ever seen."""

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def await_ready(self) -> None:
        self.url = self.await_line("listening on ").rsplit("listening on ", 1)[1]
        deadline = time.monotonic() + START_S
        while plain_http.get(f"{self.url}/ready", timeout=5).status_code != 200:
            assert time.monotonic() < deadline, self.err
            time.sleep(0.02)
        self.look()

    def await_line(self, part: str) -> str:
        deadline = time.monotonic() + START_S
        while True:
            for line in self.err.splitlines(keepends=True):
                if part in line and line.endswith("\n"):
                    self.look()
                    return line.strip()
            assert self.process.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)

    def look(self) -> None:
        """Note the processes there are now."""
        engine = psutil.Process(self.process.pid)
        self.family |= {p.pid: p for p in (engine, *engine.children(recursive=True))}

    def living(self) -> list[psutil.Process]:
        """`is_running` tells a process from a later one of the same number."""
        return [
            p for p in self.family.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = plain_http.get(
            f"{self.url}/v1/fault_tolerance/status", timeout=10
        ).json()
        return document

    def rank_pids(self) -> list[int]:
        return [engine["pid"] for engine in self.status()["engines"]]

    def fork_server(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def ended(self, timeout_s: float = 30.0) -> tuple[int, float]:
        """Exit status, and how long that took."""
        began = time.monotonic()
        return self.process.wait(timeout_s), time.monotonic() - began

    def gone_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.living()

    def assert_nothing_is_left(self) -> None:
        assert self.gone_within(0.5), f"left behind: {self.living()}"
        assert list(self.tmp.iterdir()) == []


def start_cold(arguments: list[str], tmp: str, out: int, err: int) -> Process:
    """A true command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "revivemoe.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": tmp},
    )


def start_warm(arguments: list[str], tmp: str, out: int, err: int) -> Process:
    return zygote().start(arguments, out, err, TMPDIR=tmp)


@contextmanager
def launched(model_dir: Path, *flags: str, warm: bool = False) -> Iterator[Served]:
    """Start a server and see to it that nothing outlives the test."""
    folder = Path(tempfile.mkdtemp(prefix="lifecycle-"))
    (folder / "tmp").mkdir()
    command = ["serve", str(model_dir), "--port", "0", "--device", "cpu", "--max-model-len", "512"]
    command += ["--shutdown-timeout", "2"]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        start = start_warm if warm else start_cold
        process = start([*command, *flags], str(folder / "tmp"), out.fileno(), err.fileno())
    served = Served(process, folder)
    try:
        yield served
    except BaseException:
        print(served.err)
        raise
    finally:
        if process.poll() is None:
            served.look()
        for one in served.living():
            one.kill()
        process.wait()
        shutil.rmtree(folder)


@contextmanager
def serving(model_dir: Path, num_ranks: int, *flags: str, warm: bool = False) -> Iterator[Served]:
    ranks = "--data-parallel-size", str(num_ranks)
    with launched(model_dir, *ranks, *flags, warm=warm) as served:
        served.await_ready()
        yield served


class Streams:
    """Long streams, read in a thread of their own until each has ended somehow."""

    def __init__(self, served: Served, count: int = 4, max_tokens: int = 500) -> None:
        body = {"model": "model", "prompt": [7, 8, 9], "ignore_eos": True}
        body["max_tokens"] = max_tokens
        self.results = [StreamResult() for _ in range(count)]
        self.broken = 0
        self._bodies = [{**body, "seed": i} for i in range(count)]
        self._url = served.url
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not all(result.token_ids for result in self.results):
            assert time.monotonic() < deadline, "no tokens"
            time.sleep(0.005)

    def _read(self) -> None:
        import asyncio

        try:
            asyncio.run(stream_all(self._url, self._bodies, self.results))
        except (httpx.TransportError, ExceptionGroup):
            self.broken += 1

    def assert_ended(self, timeout_s: float = 5.0) -> None:
        """By an error event, by their own end, or cut; but they have ended."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "a stream hangs"
        for result in self.results:
            assert self.broken or result.error is not None or result.finish_reason == "length"


# ---- told to end ----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "warm"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_it_with_streams_open(
    model_dir: Path, number: signal.Signals, warm: bool
) -> None:
    with serving(model_dir, 2, warm=warm) as served:
        streams = Streams(served)
        served.process.send_signal(number)
        status, took_s = served.ended()
        assert status == 0, served.err
        assert took_s < ENDED_WITHIN_S
        streams.assert_ended()
        served.assert_nothing_is_left()
        assert "Traceback" not in served.err


def test_a_signal_ends_it_although_a_rank_is_stopped(model_dir: Path) -> None:
    with serving(model_dir, 3, warm=True) as served:
        streams = Streams(served)
        os.kill(served.rank_pids()[1], signal.SIGSTOP)
        time.sleep(0.2)
        served.process.send_signal(signal.SIGTERM)
        status, took_s = served.ended()
        assert status == 0, served.err
        assert took_s < ENDED_WITHIN_S
        streams.assert_ended()
        served.assert_nothing_is_left()


@pytest.mark.parametrize("moment", ["listening on ", "fork server warm"])
def test_a_signal_during_the_start(model_dir: Path, moment: str) -> None:
    with launched(model_dir, "--data-parallel-size", "2") as served:
        served.await_line(moment)
        served.process.send_signal(signal.SIGINT)
        status, took_s = served.ended()
        served.assert_nothing_is_left()
        assert took_s < ENDED_WITHIN_S
        assert status == 0, served.err
        assert "Traceback" not in served.err


@pytest.mark.parametrize("library", ["msgspec", "libtorch_cpu", "tokenizers"])
def test_a_signal_while_libraries_are_loaded(model_dir: Path, library: str) -> None:
    """No process of ours is there yet. Moments before: tests/unit/cli/test_command_line.py."""
    with launched(model_dir) as served:
        deadline = time.monotonic() + START_S
        while not any(library in line for line in _maps(served.process.pid)):
            assert time.monotonic() < deadline, served.err
            time.sleep(0.01)
        served.process.send_signal(signal.SIGINT)
        status, took_s = served.ended()
        assert status in (0, 130, -signal.SIGINT), served.err
        assert took_s < ENDED_WITHIN_S
        assert "Traceback" not in served.err


def test_a_second_signal_while_it_ends(model_dir: Path) -> None:
    with serving(model_dir, 2, warm=True) as served:
        streams = Streams(served)
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        served.process.send_signal(signal.SIGINT)
        status, took_s = served.ended()
        assert status == 0, served.err
        assert took_s < ENDED_WITHIN_S
        streams.assert_ended()
        served.assert_nothing_is_left()
        assert "Traceback" not in served.err


# ---- killed ---------------------------------------------------------------------------------


def test_nothing_outlives_the_engine(model_dir: Path) -> None:
    """SIGKILL: no handler runs. One rank is stopped, which no pipe or socket would wake."""
    with serving(model_dir, 3) as served:
        streams = Streams(served)
        assert len(served.family) == 5, "engine, fork server, three ranks"
        for process in served.living():
            assert not named_shared_memory(process), process
        os.kill(served.rank_pids()[2], signal.SIGSTOP)
        served.process.kill()
        assert served.gone_within(KILLED_WITHIN_S), f"orphans: {served.living()}"
        assert list(served.tmp.iterdir()) == []
        streams.assert_ended()


def named_shared_memory(process: psutil.Process) -> list[str]:
    """Files of /dev/shm the process maps or holds open: they would outlive it."""
    found = [line for line in _maps(process.pid) if "/dev/shm/" in line]
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target.startswith("/dev/shm/"):
            found.append(target)
    return found


def _maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


# ---- alone ----------------------------------------------------------------------------------


def test_idle_cost_standard_output_and_the_fork_servers_death(model_dir: Path) -> None:
    with serving(model_dir, 4, "--redundant-experts", "16") as served:
        (used,) = asyncio_run(served, 1)
        assert used.finish_reason == "length"
        share = idle_share(served, 3.0)
        if share >= IDLE_CORE_SHARE:  # a loaded machine makes everything dearer: once more
            share = idle_share(served, 3.0)
        print(f"idle: {share:.2%} of a core")
        assert share < IDLE_CORE_SHARE

        streams = Streams(served, max_tokens=200)
        served.fork_server().kill()
        lengths = [len(result.token_ids) for result in streams.results]
        streams.assert_ended(60)
        assert all(result.error is None for result in streams.results)
        assert sum(len(r.token_ids) for r in streams.results) > sum(lengths)
        status = served.status()
        assert status["state"] == "serving"
        assert [e["status"] for e in status["engines"]] == ["healthy"] * 4
        assert status["recoveries"] == []

        os.kill(served.rank_pids()[1], signal.SIGKILL)
        (after,) = asyncio_run(served, 1)
        assert after.error is None
        assert after.token_ids == used.token_ids
        assert [e["status"] for e in served.status()["engines"]].count("dead") == 1

        served.process.send_signal(signal.SIGTERM)
        status_code, took_s = served.ended()
        assert status_code == 0, served.err
        assert took_s < ENDED_WITHIN_S
        served.assert_nothing_is_left()
        assert served.out == ""
        assert all(" INFO " in line or " WARNING " in line for line in served.err.splitlines())


def asyncio_run(served: Served, count: int) -> list[StreamResult]:
    import asyncio

    body = {"model": "model", "prompt": [7, 8, 9], "max_tokens": 30, "ignore_eos": True}
    bodies = [{**body, "temperature": 0, "seed": i} for i in range(count)]
    return asyncio.run(stream_all(served.url, bodies))


def idle_share(served: Served, seconds: float) -> float:
    """Processor time of the whole family over wall time, once it has settled."""
    time.sleep(1.0)
    before, began = cpu_s(served), time.monotonic()
    time.sleep(seconds)
    return (cpu_s(served) - before) / (time.monotonic() - began)


def cpu_s(served: Served) -> float:
    times = [process.cpu_times() for process in served.living()]
    return sum(t.user + t.system for t in times)


# ---- does not start -------------------------------------------------------------------------


def test_a_rank_that_cannot_start_ends_it_with_one_line(model_dir: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(model_dir, tmp_path / "model"))
    for shard in sorted(spoiled.glob("*.safetensors")):
        tensors = load_file(shard)
        tensors = {k: v[:, :5].contiguous() if "up_proj" in k else v for k, v in tensors.items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    with launched(spoiled, "--data-parallel-size", "2", warm=True) as served:
        served.await_line("listening on ")
        status, _ = served.ended(START_S)
        assert status == 2, served.err
        assert "Traceback" not in served.err
        last = served.err.splitlines()[-1]
        assert last.startswith("revivemoe: error: ")
        assert str(spoiled) in last
        served.assert_nothing_is_left()
