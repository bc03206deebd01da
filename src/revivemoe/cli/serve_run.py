"""Bring an instance up, serve it over HTTP, end it cleanly."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from revivemoe.checkpoint.inspect import CheckpointInfo, inspect_checkpoint, inspect_config
from revivemoe.cli.at_once import end_at_once
from revivemoe.cluster.launcher import EarlyStart
from revivemoe.cluster.orphans import Orphans
from revivemoe.config import EngineConfig, resolve
from revivemoe.detokenizer import Tokenizer
from revivemoe.executor.spec import ENGINE_BYTES
from revivemoe.host.descriptors import for_clients_below, raise_limit
from revivemoe.host.memory import capacity
from revivemoe.serving.memory import check_memory

if TYPE_CHECKING:
    from fastapi import FastAPI

    from revivemoe.serving.instance import Instance

log = logging.getLogger("revivemoe.serve")


@dataclass(frozen=True)
class Listen:
    """Where the API is, who may use it, and how it behaves."""

    host: str
    port: int
    api_key: str | None = None
    admin_api_key: str | None = None
    chat_template: str | None = None
    """A file, or the template itself."""
    generation_config: str = "auto"
    allowed_origins: tuple[str, ...] = ("*",)
    keep_alive_timeout_s: float = 75.0
    shutdown_timeout_s: float = 30.0
    """For open streams to come to their own end after a signal; then they get an error event."""


def check_before_weights(model_dir: Path, config: EngineConfig, listen: Listen) -> None:
    """Raises ValueError for a model of the hub that would be refused: its weights are not there."""
    inspect_config(model_dir, listen.generation_config, config.dequantize)
    load_tokenizer(model_dir)


def run(config: EngineConfig, listen: Listen) -> int:
    """Serve until a signal; returns the exit status: 0 after a signal, 1 after a failure.

    Raises ValueError and OSError for what is wrong with flags, checkpoint or address.
    """
    configure_logging()
    raise_limit()  # what is started from here on has it, too
    with _early_start() as early:
        info = inspect_checkpoint(config.model_dir, listen.generation_config, config.dequantize)
        config = resolve(config, info)
        check_memory(config, info)
        _descriptors_below(config)
        return asyncio.run(_serve(config, info, listen, early))


def _early_start() -> AbstractContextManager[EarlyStart | None]:
    """This process and the fork server load libraries for seconds: both at once, unless there is
    not even the memory for that, which is to be said, and not the kernel's killer to find out.
    """
    limit = capacity()
    return EarlyStart() if min(limit.total, limit.free) > ENGINE_BYTES else nullcontext()


def _descriptors_below(config: EngineConfig) -> int:
    """Raises ValueError if too few may be open."""
    return for_clients_below(raise_limit(), config.num_ranks, config.num_microbatches or 1)


def configure_logging() -> None:
    """Logs go to standard error, one line each; standard output stays free."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    for noisy in ("httpx", "httpcore", "uvicorn.access", "transformers", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The checkpoint's fast tokenizer, which neither cuts nor pads. ValueError if there is none."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    try:
        tokenizer = _own_tokenizer(model_dir)
    except Exception as error:  # `tokenizers` raises it bare for a file that it cannot read
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{model_dir} has no usable tokenizer: {first}") from None
    if not tokenizer.is_fast or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"{model_dir} has no usable tokenizer: only fast ones (tokenizer.json) are supported"
        )
    tokenizer.backend_tokenizer.no_truncation()  # what it was trained with may have been saved
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _own_tokenizer(model_dir: Path) -> Any:
    """As the checkpoint says, but never by code of its own: then its file alone says what it is."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except ValueError:
        if not (model_dir / "tokenizer.json").is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)


async def _serve(
    config: EngineConfig, info: CheckpointInfo, listen: Listen, early: EarlyStart | None
) -> int:
    from revivemoe.checkpoint.generation import sampling_defaults
    from revivemoe.epochs.state import FailedState
    from revivemoe.server.app import create_app
    from revivemoe.server.run import bind
    from revivemoe.server.template import read_template
    from revivemoe.serving.instance import Instance

    with bind(listen.host, listen.port):  # whether it can be had is known before loading
        pass
    tokenizer = load_tokenizer(info.model_dir)
    info = info.ending_with(tokenizer.eos_token_id)
    defaults = sampling_defaults(listen.generation_config, info.model_dir)
    template = None if listen.chat_template is None else read_template(listen.chat_template)
    stop, cut = asyncio.Event(), asyncio.Event()
    with _stop_on_signals(stop, cut):
        async with Instance(config, info, tokenizer, defaults, early) as instance:
            said = "sampling defaults (%s): %s; tokens that end a text: %s"
            log.info(said, listen.generation_config, defaults, list(info.eos_token_ids))
            app = create_app(
                instance,
                tokenizer,
                api_key=listen.api_key,
                admin_api_key=listen.admin_api_key,
                enable_fault_injection=config.enable_fault_injection,
                chat_template=template,
                allowed_origins=listen.allowed_origins,
                cut=cut,
            )
            await _serve_http(instance, app, listen, stop)
            state = instance.engine.state
    if isinstance(state, FailedState) and state.user_error:
        raise ValueError(state.reason)
    return 1 if isinstance(state, FailedState) else 0


async def _serve_http(
    instance: "Instance", app: "FastAPI", listen: Listen, stop: asyncio.Event
) -> None:
    """Until `stop` is set, by a signal or because the instance cannot start."""
    from revivemoe.server.run import serve_app

    beside = [asyncio.create_task(_watch_start(instance, stop))]
    if os.getpid() == 1:
        beside.append(asyncio.create_task(Orphans().keep_looking()))
    try:
        await serve_app(
            app,
            listen.host,
            listen.port,
            stop=stop,
            on_started=_say_where,
            shutdown_timeout_s=listen.shutdown_timeout_s,
            keep_alive_timeout_s=listen.keep_alive_timeout_s,
            descriptors_below=_descriptors_below(instance.config),
        )
    finally:
        stop.set()
        for task in beside:
            task.cancel()


async def _watch_start(instance: "Instance", stop: asyncio.Event) -> None:
    """Say when the instance serves; a start that fails ends the process at once."""
    serving = asyncio.create_task(instance.serving.wait())
    ended = asyncio.create_task(instance.ended.wait())
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        stop.set()
        return
    ended.cancel()
    log.info("serving %s with %d ranks", instance.model.name, instance.config.num_ranks)


def _say_where(host: str, port: int) -> None:
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event, cut: asyncio.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for an orderly end, the second time for one without further waiting
    (`cut`); after it they end the process at once.

    Not by the loop's own handlers: it would give SIGINT back to Python, whose exception would
    come out of whatever the interpreter does while it ends.
    """
    loop = asyncio.get_running_loop()
    asked = False
    """What the loop is told it does later: a second signal may come before."""

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        loop.call_soon_threadsafe(cut.set if asked or stop.is_set() else stop.set)
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    try:
        yield
    finally:
        end_at_once()
