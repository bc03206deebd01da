"""A poison request must not walk through the ranks, killing each.

When a rank fails in a way that a request may bring about (its own exception, a crash, a hang, NaN),
the requests it ran become suspects. Each is tried again alone: one suspect per rank at a time,
until it has got on by a token. If the rank of a suspect on trial fails in the same way, and nothing
else there was new, that one is convicted: two ranks, no more, and no other request ends.
"""

from collections.abc import Sequence

from revivemoe.engine.ledger import (
    LiveRequest,
    Suspicion,
    Victim,
)

MAX_STRIKES = 3
"""Convicted on trial after so many faults, alike or not."""


def strike(victims: Sequence[Victim], signature: str) -> LiveRequest | None:
    """A rank that ran `victims` has failed. Returns the one to be convicted, if it is proven."""
    unproven = [v for v in victims if not v.proven]
    tried = next((v.request for v in unproven if v.on_trial), None)
    if tried is not None and tried.suspicion is not None and len(unproven) == 1:
        suspicion = tried.suspicion
        suspicion.strikes += 1
        if suspicion.signature == signature or suspicion.strikes >= MAX_STRIKES:
            return tried
        suspicion.signature = signature
        return None
    for victim in victims:
        before = victim.request.suspicion
        strikes = 0 if before is None else before.strikes
        victim.request.suspicion = Suspicion(strikes + 1, signature)
    return None
