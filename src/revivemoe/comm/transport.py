"""What dispatch needs from a transport, and the one for a domain of a single member.

Legend for shapes: N members, M rows sent by this rank, B bytes per row.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId

MAX_INTS = 16
"""Widest row of `all_gather_ints`."""


@dataclass(frozen=True)
class Flow:
    """Which way the rows of one exchange go, as one member sees it. Logical ranks; None: all.

    All members take part in every exchange; those that send nothing to anybody, or get nothing from
    anybody, by the roles they have, need not be waited for, and need not wait.
    """

    senders: tuple[int, ...] | None = None
    """Whose rows this member waits for."""
    receivers: tuple[int, ...] | None = None
    """Who waits for this member's rows."""


EVERYBODY = Flow()


class Transport(ABC):
    """Collective exchanges among the members of one epoch, all in the same order on every member.

    Every method may raise DomainLeft (the epoch is fenced) or CommunicationFailed (a symptom).
    After either, the transport is of no use but to be closed.
    """

    def __init__(
        self,
        waiter: Waiter,
        epoch: Epoch,
        members: tuple[RankId, ...],
        me: RankId,
        device: torch.device,
    ) -> None:
        """`device`: where outbox and inbox lie."""
        self.members = members
        self.index = members.index(me)
        """This rank's logical rank: its position in `members`."""
        self.size = len(members)
        self.epoch = epoch
        self.device = device
        self._waiter = waiter

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for peers so far; the rest of a step is the rank's own work."""
        return self._waiter.waited_s

    def check_fence(self) -> None:
        """Raise DomainLeft if the epoch is fenced: for work between exchanges."""
        self._waiter.check_fence()

    @abstractmethod
    def all_gather_ints(self, row: Sequence[int]) -> list[list[int]]:
        """Everybody's row, by logical rank. All rows have the same width, at most MAX_INTS."""

    @abstractmethod
    def outbox(
        self,
        row_bytes: int,
        rows_to: Sequence[int],
        rows_from: Sequence[int] | None = None,
        flow: Flow = EVERYBODY,
    ) -> torch.Tensor:
        """Begin an uneven all-to-all. Returns uint8 `[M, B]` to be filled with the rows for member
        0, then those for member 1, ...: `rows_to[i]` rows for member i, M in all. `row_bytes` is
        the same on every member. `rows_from`: the number of rows each member sends, where the
        caller knows it (saves a transport without a table of its own one round).
        Must be followed by `send`.
        """

    @abstractmethod
    def send(self) -> None:
        """Send the outbox. Waits for nobody's rows. Must be followed by `receive`."""

    @abstractmethod
    def receive(self) -> list[torch.Tensor]:
        """What each member sent here, uint8 `[rows, B]`, by logical rank: waits for the senders,
        and takes nothing from others. The result is valid until the next `outbox`.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave. Waits for nobody; a second call does nothing."""


class SoloTransport(Transport):
    """A domain of one: no peers, no traffic, only the fence."""

    def all_gather_ints(self, row: Sequence[int]) -> list[list[int]]:
        self._waiter.check_fence()
        return [list(row)]

    def outbox(
        self,
        row_bytes: int,
        rows_to: Sequence[int],
        rows_from: Sequence[int] | None = None,
        flow: Flow = EVERYBODY,
    ) -> torch.Tensor:
        self._waiter.check_fence()
        (rows,) = rows_to
        self._outbox = torch.empty(rows, row_bytes, dtype=torch.uint8, device=self.device)
        return self._outbox

    def send(self) -> None:
        pass

    def receive(self) -> list[torch.Tensor]:
        self._waiter.check_fence()
        return [self._outbox]

    def close(self) -> None:
        pass
