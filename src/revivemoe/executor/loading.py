"""Loads experts and dense shards into this rank: before a resume, or beside the steps.

A load that fails is told, and leaves the rank as it was but for the slots it was to fill.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from revivemoe.comm.domain import Domains
from revivemoe.core.effects import Load, Loaded, LoadFailed
from revivemoe.core.progress import Progress
from revivemoe.core.slots import SlotTaken
from revivemoe.executor.failures import in_one_line, load_failure
from revivemoe.executor.weights import PeerSource
from revivemoe.host.cuda_thread import on_device
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.membership import Membership
from revivemoe.messages.commands import DomainSpec, LoadExperts
from revivemoe.messages.reports import ExpertsLoaded
from revivemoe.model.runner import ModelRunner, return_memory

LOAD_BUDGET_S = 20.0
"""What loading a portion of experts may take, a slow disk included."""
T = TypeVar("T")
Done = Callable[[ExpertsLoaded], None]


@dataclass
class Loader:
    """Fills the slots of one rank."""

    _runner: ModelRunner
    _domains: Domains
    _progress: Progress
    _me: tuple[RankId, Incarnation]
    _peers: Sequence[PeerSource] = ()
    """Of the present epoch."""

    def entered(self, membership: Membership, domain: DomainSpec) -> None:
        """An epoch has begun: its members may be asked for what they hold."""
        self._peers = (PeerSource(membership, domain.weights, self._me[0]),)

    # ---- before a resume ---------------------------------------------------------------------

    def load(self, wanted: Load) -> Loaded:
        """What the slots do not hold yet. Raises Left if fenced meanwhile, LoadFailed."""
        return or_load_failed(partial(self._load, wanted))

    def give_up_attention(self, num_slots: int) -> None:
        """`ModelRunner.become_expert_rank`. Raises LoadFailed without memory for the slots."""
        self._progress.announce("role switch", LOAD_BUDGET_S)
        or_load_failed(partial(self._runner.become_expert_rank, num_slots))

    def _load(self, wanted: Load) -> Loaded:
        began, num_bytes, sources = time.monotonic(), 0, Counter[str]()
        worker = self._runner.worker
        peers = [PeerSource(wanted.membership, wanted.domain.weights, self._me[0])]
        for some in worker.in_portions(worker.slots.lacking(wanted.table)):
            self._domains.check_fence(wanted.epoch)  # it must not wait for all
            self._progress.announce("load", LOAD_BUDGET_S)
            report = worker.load(some, peers)
            num_bytes += report.num_bytes
            sources.update(report.sources)
        if wanted.shards:
            self._progress.announce("load", LOAD_BUDGET_S)
            self._runner.load_shards(wanted.shards)
        return Loaded(time.monotonic() - began, num_bytes, dict(sources))

    # ---- beside the steps --------------------------------------------------------------------

    def load_beside(self, command: LoadExperts, done: Done) -> None:
        """In a thread of its own, into slots that the present epoch does not use. From here on the
        slots are that load's. `done` is called from that thread, however it ends.
        """
        try:
            begun = self._runner.worker.begin(command.loads)
            work = (command, begun, self._peers, done)
            aside = on_device(str(self._runner.device), self._load_aside)
            threading.Thread(target=aside, args=work, name="load", daemon=True).start()
        except (LookupError, RuntimeError, MemoryError) as failure:  # no such slot, or no thread
            done(self._answer(command, time.monotonic(), 0, in_one_line(failure)))

    def _load_aside(
        self, command: LoadExperts, begun: int, peers: Sequence[PeerSource], done: Done
    ) -> None:
        began, num_bytes, error, taken = time.monotonic(), 0, None, False
        worker = self._runner.worker
        try:
            for some in worker.in_portions(command.loads):
                num_bytes += worker.load(some, peers, begun).num_bytes
        except BaseException as failure:  # nobody waits for this thread: it must not end in silence
            error, taken = in_one_line(failure), isinstance(failure, SlotTaken)
        done(self._answer(command, began, num_bytes, error, taken))

    def _answer(
        self,
        command: LoadExperts,
        began: float,
        num_bytes: int,
        error: str | None,
        taken_over: bool = False,
    ) -> ExpertsLoaded:
        seconds = time.monotonic() - began
        return ExpertsLoaded(*self._me, command.request, seconds, num_bytes, error, taken_over)


def or_load_failed(act: Callable[[], T]) -> T:
    """Raises LoadFailed, and lets go of what was half there, if what fails is not our own code."""
    try:
        return act()
    except Exception as error:
        failure = load_failure(error)
        if failure is None:
            raise
    return_memory()  # out of the handler: a traceback keeps what its frames hold
    raise LoadFailed(failure)
