"""A poison request must not walk through the ranks, killing each.

When a rank fails in a way that a request may bring about (its own exception, a crash, a hang, NaN),
the requests it ran become suspects. Each is tried again alone: one suspect per rank at a time,
until it has got on by a token. If the rank of a suspect on trial fails in the same way, that one
is convicted: two ranks, no more, and no other request ends.
"""

from collections.abc import Sequence

from revivemoe.ids import RankId
from revivemoe.ledger import LiveRequest, Suspicion

MAX_STRIKES = 3
"""Convicted on trial after so many faults, alike or not."""


def strike(
    victims: Sequence[LiveRequest], on_trial: LiveRequest | None, signature: str
) -> LiveRequest | None:
    """A rank that ran `victims` has failed. Returns the one to be convicted, if it is proven.

    `on_trial`: the suspect among them that was being tried on the rank.
    """
    if on_trial is not None and on_trial.suspicion is not None:
        suspicion = on_trial.suspicion
        suspicion.strikes += 1
        if suspicion.signature == signature or suspicion.strikes >= MAX_STRIKES:
            return on_trial
        suspicion.signature = signature
        return None
    for request in victims:
        before = request.suspicion.strikes if request.suspicion is not None else 0
        request.suspicion = Suspicion(before + 1, signature)
    return None


def on_trial_at(rank: RankId, requests: Sequence[LiveRequest]) -> LiveRequest | None:
    """The suspect that is being tried on a rank."""
    for request in requests:
        if request.suspicion is not None and request.suspicion.trial == rank:
            return request
    return None
