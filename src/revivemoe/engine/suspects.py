"""A poison request must not walk through the ranks, killing each.

When a rank fails in a way that a request may bring about (its own exception, a crash, a hang, NaN,
memory), the requests it ran become suspects; so does a request whose ranks have died twice, for
whatever reason. Each is tried again alone: one suspect per rank at a time, until it has got on by a
token. If the rank of a suspect on trial fails in the same way, and nothing else there was new, that
one is convicted: two ranks, no more, and no other request ends.

A suspect gets its turn however many others come: where no rank is free of what is new, one is
reserved, and nothing new goes there any more.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from revivemoe.engine.requests import LiveRequest
from revivemoe.ids import RankId, SeqId

MAX_STRIKES = 3
"""Convicted on trial after so many faults, alike or not."""
DEATHS = 2
"""Suspect after so many deaths of its ranks, whatever they died of."""


@dataclass(frozen=True)
class Victim:
    """A request that was on a rank that failed."""

    request: LiveRequest
    proven: bool
    """All its sequences there had got on by a token since they came."""


@dataclass
class Suspicion:
    """Of a request that was running when a rank failed in a way that a request may bring about."""

    request: LiveRequest
    signature: str
    """Kind and place of the last fault."""
    trial: RankId | None = None
    """The rank that runs it, and no other suspect, until it has got on by a token."""
    reserved: RankId | None = None
    """The rank on which it will be tried."""
    unproven: set[SeqId] = field(default_factory=set)
    """Its sequences that have not, yet."""


class Suspects:
    """Every suspicion there is, by the request's order of admission."""

    def __init__(self) -> None:
        self._suspicions: dict[int, Suspicion] = {}
        self._deaths: Counter[int] = Counter()
        """How many ranks have died under each request before it had got on by a token there."""
        self._strikes: Counter[int] = Counter()
        """How often each has been a suspect, or has struck again on trial: not forgotten because
        it took its time."""
        self._timed_out: set[int] = set()
        """Those whose trial was ended by time: it goes on, in a way."""

    def __len__(self) -> int:
        return len(self._suspicions)

    def __contains__(self, request: LiveRequest) -> bool:
        return request.arrival in self._suspicions

    @property
    def trials(self) -> frozenset[RankId]:
        """Ranks on which a suspect is being tried: nothing new goes there."""
        return frozenset(s.trial for s in self._suspicions.values() if s.trial is not None)

    @property
    def reserved(self) -> frozenset[RankId]:
        """Ranks on which one will be tried: nothing new goes there either."""
        return frozenset(s.reserved for s in self._suspicions.values() if s.reserved is not None)

    def all(self) -> list[Suspicion]:
        """Every suspicion, oldest request first."""
        return [self._suspicions[key] for key in sorted(self._suspicions)]

    def clear(self, request: LiveRequest) -> None:
        """It has run long enough without bringing anything down. What it did before counts."""
        if self._suspicions.pop(request.arrival, None) is not None:
            self._timed_out.add(request.arrival)

    # ---- trials ------------------------------------------------------------------------------

    def target(
        self,
        request: LiveRequest,
        load: Mapping[RankId, int],
        unproven: Set[RankId],
        pending: Set[SeqId],
    ) -> RankId | None:
        """The rank for a request's next sequence, the one with the least load; None: it waits.

        A suspect is tried where nothing else is new, and nothing new goes where one is tried; half
        of the ranks stay open to what is new, if there are several. `unproven`: ranks with a
        sequence that has not got on by a token there. `pending`: those of the request.
        """
        suspicion = self._suspicions.get(request.arrival)
        if suspicion is None:
            return _least(load, self.trials | self.reserved)
        if suspicion.trial in load:
            return suspicion.trial
        others = {s.reserved for s in self._suspicions.values() if s is not suspicion} - {None}
        suspicion.reserved = None
        if len((self.trials | others) & load.keys()) >= (len(load) + 1) // 2:
            return None
        target = _least(load, self.trials | unproven | others)
        if target is None:
            suspicion.reserved = _least(load, self.trials | others)
        else:
            suspicion.trial, suspicion.unproven = target, set(pending)
        return target

    def got_on(self, request: LiveRequest, seq_id: SeqId) -> None:
        """A sequence has committed its first token on its present rank."""
        suspicion = self._suspicions.get(request.arrival)
        if suspicion is None or suspicion.trial is None:
            return
        suspicion.unproven.discard(seq_id)
        if not suspicion.unproven:
            del self._suspicions[request.arrival]
            self._strikes.pop(request.arrival, None)
            self._timed_out.discard(request.arrival)

    def closed(self, request: LiveRequest, seq_id: SeqId) -> None:
        """A sequence is finished."""
        if not request.unfinished:
            self._suspicions.pop(request.arrival, None)
            self._deaths.pop(request.arrival, None)
            self._strikes.pop(request.arrival, None)
            self._timed_out.discard(request.arrival)
        elif suspicion := self._suspicions.get(request.arrival):
            suspicion.unproven.discard(seq_id)

    # ---- faults ------------------------------------------------------------------------------

    def lost(
        self, rank: RankId, victims: Sequence[Victim], signature: str, died: bool = False
    ) -> LiveRequest | None:
        """A rank is out that ran `victims`. Returns the one to be convicted, if it is proven.

        `signature`: kind and place of a fault that a request may have brought about; "" for others.
        `died`: it may have been killed, by whatever it was.
        """
        tried = self._end_trials(rank, {v.request.arrival for v in victims})
        if died:
            self._deaths.update(v.request.arrival for v in victims if not v.proven)
        if not signature:
            victims = [v for v in victims if self._deaths[v.request.arrival] >= DEATHS]
        if not signature and not (died and victims):
            return None
        unproven = [v.request for v in victims if not v.proven]
        if len(unproven) == 1 and unproven[0].arrival in tried | self._timed_out:
            return self._strike_again(unproven[0], signature)
        for victim in victims:
            key = victim.request.arrival
            self._strikes[key] += 1
            self._suspicions[key] = self._renewed(victim.request, signature)
        return None

    def _end_trials(self, rank: RankId, victims: Set[int]) -> set[int]:
        """Of those that ran there. One that was moved off before goes on with its trial."""
        tried = {k for k, s in self._suspicions.items() if s.trial == rank and k in victims}
        for suspicion in self._suspicions.values():
            suspicion.reserved = None if suspicion.reserved == rank else suspicion.reserved
        for key in tried:
            self._suspicions[key].trial = None
        return tried

    def _strike_again(self, request: LiveRequest, signature: str) -> LiveRequest | None:
        key = request.arrival
        before = self._suspicions.get(key)
        self._strikes[key] += 1
        self._suspicions[key] = self._renewed(request, signature)
        alike = before is not None and bool(signature) and before.signature == signature
        return request if alike or self._strikes[key] >= MAX_STRIKES else None

    def _renewed(self, request: LiveRequest, signature: str) -> Suspicion:
        """Under suspicion again: of what it was suspected of before, unless that is clearer now."""
        before = self._suspicions.get(request.arrival)
        return Suspicion(request, signature or ("" if before is None else before.signature))

    def convicted(self, request: LiveRequest) -> None:
        """It brings down whoever runs it. So the faults that made others suspects are explained."""
        suspicion = self._suspicions.get(request.arrival)
        if suspicion is None:
            return
        alike = [k for k, s in self._suspicions.items() if s.signature == suspicion.signature]
        for key in alike:
            del self._suspicions[key]
            self._strikes.pop(key, None)


def _least(load: Mapping[RankId, int], shut: Set[RankId | None]) -> RankId | None:
    """The open rank with the least load."""
    free = [rank for rank in load if rank not in shut]
    return min(free, key=lambda rank: (load[rank], rank), default=None)
