"""Entry point of a rank process, called by the fork server in the freshly forked child."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.nccl import SETTINGS
from revivemoe.core.effects import LoadFailed
from revivemoe.core.progress import Progress
from revivemoe.core.rank import Rank
from revivemoe.executor.compile_cache import compile_cache
from revivemoe.executor.control import ControlThread, Told
from revivemoe.executor.driver import Driver
from revivemoe.executor.failures import in_one_line, load_failure
from revivemoe.executor.kv_size import OutOfMemoryForKV, num_kv_blocks
from revivemoe.executor.reporting import ReportSocket
from revivemoe.executor.spec import RankSpec
from revivemoe.executor.weights import WeightServer
from revivemoe.host.cuda_thread import on_device, use_device
from revivemoe.host.variables import set_variables
from revivemoe.kernels.library import NoKernels
from revivemoe.messages.reports import Fatal, RankStats, Ready, Report
from revivemoe.model.batch_invariant import BatchVariant
from revivemoe.model.load import CheckpointError
from revivemoe.model.runner import DenseSpec, ModelRunner

FAILED, USER_ERROR = 1, 2
T = TypeVar("T")


def run_rank(
    spec: RankSpec, lifeline: int, segment_fd: int | None, cache_fd: int | None = None
) -> int:
    """Run one rank until told to stop; returns the exit status.

    The broad catch here is one of the project's two process boundaries: a broken rank reports its
    last words and exits, and its owner sees the exit.
    """
    if spec.device.startswith("cuda"):
        set_variables(SETTINGS)
        use_device(spec.device)
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
            fill = on_device(spec.device, runner.worker.fill_host_cache)
            threading.Thread(target=fill, name="cache", daemon=True).start()
        num_blocks = num_kv_blocks(spec, runner)
        _in_one_line(partial(runner.allocate, num_blocks, spec.limits.block_size))
        compiled = _compile(spec, runner)
        limits = replace(spec.limits, num_blocks=num_blocks)
        rank = Rank(spec.rank, spec.incarnation, limits, runner.worker.slots)
        with (
            WeightServer(spec.weights, on_device(spec.device, runner.worker.find)),
            Domains(fence, segment_fd, spec.device, progress.waits) as domains,
        ):
            driver = Driver(rank, runner, domains, control.commands, report, progress)
            published.append(driver)
            ready = (num_blocks, runner.load_s, runner.maskable)
            kernels = runner.kernels.told
            who = spec.rank, spec.incarnation, spec.device
            report(Ready(*who, *ready, kernels=kernels, graphs=compiled))
            driver.run()


def _in_one_line(start: Callable[[], T]) -> T:
    """Raises CheckpointError, and LoadFailed for what else is not our own code's fault."""
    try:
        return start()
    except CheckpointError:
        raise
    except NoKernels as error:
        raise CheckpointError(f"no kernels of our own, and they are asked for: {error}") from None
    except BatchVariant as error:
        raise CheckpointError(f"--batch-invariant: not with this model: {error}") from None
    except Exception as error:
        failure = load_failure(error)
        if failure is None:
            raise
        raise LoadFailed(f"weights: {failure}") from error


def _compile(spec: RankSpec, runner: ModelRunner) -> str:
    """Outside of any domain, so nobody waits for it. What came of it, for people."""
    if not spec.in_graphs:
        return ""
    if not spec.attention:  # it has nothing to wait for either
        return "none: no attention"
    with ExitStack() as stack:
        try:
            said = stack.enter_context(compile_cache([Path(f) for f in spec.compile_cache]))
        except OSError as error:
            runner.run_eagerly()
            return f"none: {in_one_line(error)}"
        return f"{runner.compile()}{said}"


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
        spec.kernels,
        spec.batch_invariant,
        spec.in_graphs,
    )
