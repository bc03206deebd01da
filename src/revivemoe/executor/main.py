"""Entry point of a rank process, called by the fork server in the freshly forked child."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import FenceFlag
from revivemoe.core.effects import LoadFailed
from revivemoe.core.progress import Progress
from revivemoe.core.rank import Rank
from revivemoe.executor.control import ControlThread, Told
from revivemoe.executor.driver import Driver
from revivemoe.executor.failures import load_failure
from revivemoe.executor.reporting import ReportSocket
from revivemoe.executor.spec import RankSpec
from revivemoe.executor.weights import WeightServer
from revivemoe.messages.reports import Fatal, RankStats, Ready, Report
from revivemoe.model.load import CheckpointError
from revivemoe.model.runner import DenseSpec, ModelRunner

FAILED, USER_ERROR = 1, 2
T = TypeVar("T")


class OutOfMemoryForKV(ValueError):
    """The KV cache cannot hold even one sequence of the longest length."""


def run_rank(
    spec: RankSpec, lifeline: int, segment_fd: int | None, cache_fd: int | None = None
) -> int:
    """Run one rank until told to stop; returns the exit status.

    The broad catch here is one of the project's two process boundaries: a broken rank reports its
    last words and exits, and its owner sees the exit.
    """
    torch.set_num_threads(spec.threads)
    torch.set_grad_enabled(False)
    with ReportSocket(spec.reports) as socket:
        report = socket.send
        try:
            _serve(spec, lifeline, segment_fd, cache_fd, report)
        except (CheckpointError, OutOfMemoryForKV, NotImplementedError) as error:
            report(Fatal(spec.rank, spec.incarnation, str(error), user_error=True))
            return USER_ERROR
        except LoadFailed as error:
            report(Fatal(spec.rank, spec.incarnation, str(error)))
            return FAILED
        except Exception:
            text = traceback.format_exc()
            sys.stderr.write(f"rank {spec.rank}: {text}")
            report(Fatal(spec.rank, spec.incarnation, text))
            return FAILED
    return 0


def _serve(
    spec: RankSpec,
    lifeline: int,
    segment_fd: int | None,
    cache_fd: int | None,
    report: Callable[[Report], None],
) -> None:
    fence, progress = FenceFlag(), Progress(time.monotonic)
    published: list[Driver] = []

    def told() -> Told:
        if not published:
            return RankStats(), None
        return published[0].stats(), published[0].holdings()

    with ControlThread(spec, lifeline, fence, progress, told, report) as control:
        runner = _in_one_line(partial(_load, spec))
        if cache_fd is not None:
            runner.worker.attach_host_cache(cache_fd)
            threading.Thread(
                target=runner.worker.fill_host_cache, name="cache", daemon=True
            ).start()
        num_blocks = _num_blocks(spec, runner)
        _in_one_line(partial(runner.allocate, num_blocks, spec.limits.block_size))
        limits = replace(spec.limits, num_blocks=num_blocks)
        rank = Rank(spec.rank, spec.incarnation, limits, runner.worker.slots)
        with (
            WeightServer(spec.weights, runner.worker.find),
            Domains(fence, segment_fd, spec.device, progress.waits) as domains,
        ):
            driver = Driver(rank, runner, domains, control.commands, report, progress)
            published.append(driver)
            ready = (num_blocks, runner.load_s, runner.maskable)
            report(Ready(spec.rank, spec.incarnation, spec.device, *ready))
            driver.run()


def _in_one_line(start: Callable[[], T]) -> T:
    """Raises CheckpointError, and LoadFailed for what else is not our own code's fault."""
    try:
        return start()
    except CheckpointError:
        raise
    except Exception as error:
        failure = load_failure(error)
        if failure is None:
            raise
        raise LoadFailed(f"weights: {failure}") from error


def _load(spec: RankSpec) -> ModelRunner:
    return ModelRunner(
        Path(spec.model_dir),
        spec.slots,
        spec.num_experts,
        spec.top_k,
        getattr(torch, spec.dtype),
        torch.device(spec.device),
        spec.attention,
        DenseSpec(spec.dense_layers, spec.dense_ffn_tp, spec.dense_shards),
    )


def _num_blocks(spec: RankSpec, runner: ModelRunner) -> int:
    """Blocks of the KV cache; none without the attention role.

    Raises OutOfMemoryForKV if one longest sequence does not fit.
    """
    if not spec.attention:
        return 0
    limits = spec.limits
    per_sequence = limits.blocks_for(limits.max_model_len)
    per_block = runner.kv_bytes_per_block(limits.block_size)
    free = _free_bytes(spec.device)
    if spec.num_kv_blocks is not None:
        num_blocks = spec.num_kv_blocks
        if num_blocks * per_block > free:
            raise OutOfMemoryForKV(
                f"KV cache of rank {spec.rank}: --num-kv-blocks {num_blocks} takes "
                f"{num_blocks * per_block / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free: "
                "lower --num-kv-blocks"
            )
    else:
        affordable = int(free * spec.kv_memory_share) // per_block
        num_blocks = min(affordable, per_sequence * limits.max_num_seqs)
    if num_blocks < per_sequence:
        raise OutOfMemoryForKV(
            f"KV cache of rank {spec.rank}: {num_blocks} blocks of {limits.block_size} tokens "
            f"({num_blocks * per_block / 2**20:.0f} MiB) cannot hold one sequence of "
            f"--max-model-len {limits.max_model_len} tokens ({per_sequence} blocks, "
            f"{per_sequence * per_block / 2**20:.0f} MiB): lower --max-model-len, "
            "raise --num-kv-blocks, or give the machine more memory"
        )
    return num_blocks


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)
