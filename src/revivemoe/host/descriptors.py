"""Descriptors: as many as the host lets us have, and some that no client gets.

The kernel gives out the lowest free number. So a new descriptor tells by its number how many are in
use, whoever uses them, and nobody has to count.
"""

import os
import resource

CEILING = 65536
"""Enough; where the hard limit is a billion, programs that go through all numbers take for ever."""
CLIENTS_AT_LEAST = 16


def raise_limit() -> int:
    """Raise the soft limit to the hard one; processes started from now on have it, too. Returns the
    limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CEILING if hard == resource.RLIM_INFINITY else min(hard, CEILING)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return CEILING if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def lowest_free() -> int:
    """Raises OSError if there is none."""
    with open(os.devnull) as file:
        return file.fileno()


def in_use_by(num_ranks: int) -> int:
    """Of an engine, without clients: per rank a pidfd, and a socket each way with its signaller."""
    return 24 + 4 * num_ranks


def reserve_for(num_ranks: int, channels: int) -> int:
    """What launching every rank anew may take before the old ones are gone: twice what a rank
    holds, clients of the store in the old epoch and the new (gloo, NCCL), a new fork server, files.
    """
    return 32 + num_ranks * (8 + 2 * channels)


def for_clients_below(limit: int, num_ranks: int, channels: int) -> int:
    """The number from which on descriptors are not for clients.

    Raises ValueError if the limit leaves them next to nothing.
    """
    reserve = reserve_for(num_ranks, channels)
    least = in_use_by(num_ranks) + reserve + CLIENTS_AT_LEAST
    if limit < least:
        raise ValueError(
            f"a process may open {limit} files (ulimit -n): {num_ranks} ranks need at least {least}"
        )
    return limit - reserve
