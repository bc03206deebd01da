"""Loads experts and dense shards into this rank: before a resume, or beside the steps."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from revivemoe.comm.domain import Domains
from revivemoe.core.effects import Load, Loaded, LoadFailed
from revivemoe.core.progress import Progress
from revivemoe.core.slots import SlotTaken
from revivemoe.executor.weights import PeerSource
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.membership import Membership
from revivemoe.messages.commands import DomainSpec, LoadExperts
from revivemoe.messages.reports import ExpertsLoaded
from revivemoe.model.load import CheckpointError
from revivemoe.model.runner import ModelRunner

LOAD_BUDGET_S = 20.0
"""What loading a portion of experts may take, a slow disk included."""


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

    def load(self, wanted: Load) -> Loaded:
        """What the slots do not hold yet. Raises Left if fenced meanwhile, LoadFailed."""
        began, num_bytes, sources = time.monotonic(), 0, Counter[str]()
        loads = self._runner.worker.slots.lacking(wanted.table)
        peers = [PeerSource(wanted.membership, wanted.domain.weights, self._me[0])]
        try:
            for some in self._runner.worker.in_portions(loads):  # a fence must not wait for all
                self._domains.check_fence(wanted.epoch)
                self._progress.announce("load", LOAD_BUDGET_S)
                report = self._runner.worker.load(some, peers)
                num_bytes += report.num_bytes
                sources.update(report.sources)
            if wanted.shards:
                self._progress.announce("load", LOAD_BUDGET_S)
                self._runner.load_shards(wanted.shards)
        except (CheckpointError, OSError) as error:
            raise LoadFailed(str(error)) from error
        return Loaded(time.monotonic() - began, num_bytes, dict(sources))

    def load_beside(self, command: LoadExperts, done: Callable[[ExpertsLoaded], None]) -> None:
        """In a thread of its own, into slots that the present epoch does not use. `done` is called
        from that thread. From here on the slots are that load's.
        """
        begun = self._runner.worker.begin(command.loads)
        threading.Thread(
            target=self._load_aside,
            args=(command, begun, self._peers, done),
            name="load",
            daemon=True,
        ).start()

    def _load_aside(
        self,
        command: LoadExperts,
        begun: int,
        peers: Sequence[PeerSource],
        done: Callable[[ExpertsLoaded], None],
    ) -> None:
        began, num_bytes, error = time.monotonic(), 0, None
        try:
            num_bytes = self._runner.worker.load(command.loads, peers, begun).num_bytes
        except (CheckpointError, OSError, RuntimeError, SlotTaken) as failure:
            error = str(failure)
        seconds = time.monotonic() - began
        done(ExpertsLoaded(*self._me, command.request, seconds, num_bytes, error))
