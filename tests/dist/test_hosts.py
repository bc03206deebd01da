"""Hosts that give little: memory, descriptors, names, places to write."""

import os
import resource
import signal
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from support.cases import Weights
from support.deployment import deployed, kill
from support.forked import HARD_FILES, SOFT_FILES
from support.memory_limit import MOUNT, CannotLimit
from support.unkind_host import UnkindHost

from revivemoe.bench import plain_http

FEW = 160
"""Files; more than support.forked takes for itself."""
LARGE = ("--max-num-seqs", "256", "--max-model-len", "4096", "--device", "cpu")
BLOCK_BYTES = 16 << 10
"""Of the tiny model in fp32."""


def checked(host: UnkindHost) -> UnkindHost:
    try:
        host.check()
    except (CannotLimit, OSError) as error:
        pytest.skip(str(error))
    return host


def complete(url: str, model: str) -> str:
    body = {"model": model, "prompt": "Once", "max_tokens": 8, "temperature": 0}
    answer = plain_http.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def cgroup_usage() -> int:
    names = ("memory/revivemoe-unkind/memory.usage_in_bytes", "revivemoe-unkind/memory.current")
    return next(int((MOUNT / n).read_text()) for n in names if (MOUNT / n).exists())


def test_two_gib_no_name_no_user_and_nothing_to_write_on(qwen: Weights) -> None:
    """The KV cache, whose pages are written when it is made, is as large as the limit allows."""
    flags = ["--data-parallel-size", "2", "--redundant-experts", "16", "--comm-backend", "gloo"]
    with checked(UnkindHost(qwen.dir, 2048, *flags, *LARGE)) as server:
        before, text = server.status(), complete(server.url, "model")
        blocks = sum(engine["kv_blocks_total"] for engine in before["engines"])
        assert before["engines"][0]["host"] == "nonsense.invalid"
        assert os.stat(f"/proc/{server.pid}").st_uid == 12345
        assert 1 << 29 < blocks * BLOCK_BYTES < cgroup_usage() < 2 << 30
        server.kill_pid(server.rank_pid(1), signal.SIGKILL)
        assert complete(server.url, "model") == text
        assert "Warning" not in server.log_tail(100)


def test_too_little_memory_is_said_before_anything_is_loaded(qwen: Weights) -> None:
    host = checked(UnkindHost(qwen.dir, 300, "--data-parallel-size", "2", *LARGE))
    with pytest.raises(RuntimeError) as raised:
        host.start()
    assert host.stop() == 2
    (line,) = str(raised.value).splitlines()[1:]
    assert line.startswith("revivemoe: error: 300 MiB of memory (/sys/fs/cgroup/")
    assert "raise the limit" in line


@pytest.mark.parametrize("limit", [SOFT_FILES, HARD_FILES])
def test_more_connections_than_files_and_no_rank_left(
    qwen: Weights, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft limit is raised; within the hard one idle connections make room."""
    flags = ["--redundant-experts", "16", "--max-model-len", "64"]
    monkeypatch.setenv(limit, str(FEW))
    with ExitStack() as stack, deployed(qwen.dir, 4, *flags, auto_rejoin=True) as server:
        soft, _ = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        assert (soft > FEW) == (limit == SOFT_FILES)
        address, pids = urlsplit(server.url), server.pids()
        for _ in range(300):
            idle = stack.enter_context(socket.socket())
            idle.connect((address.hostname, address.port))
        kill(*pids.values())
        server.await_status(lambda s: s["state"] == "serving" and s["epoch"] > 1)
        assert complete(server.url, qwen.dir.name)
        log = server.log_tail(2000)
        assert "Traceback" not in log
        assert log.count("no new connections for now") == (limit == HARD_FILES)
