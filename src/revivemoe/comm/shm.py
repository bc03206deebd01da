"""Shared memory transport: an anonymous memfd, one region per rank *id*, no locks.

    segment   | page 0: magic, N, region bytes, C | one line per rank: epoch it has entered |
              | area of even epochs | area of odd epochs |
    area      | channel 0: region of rank 0, rank 1, ... | channel 1: same | ... C channels
    region    | half of even exchanges | half of odd exchanges |
    half      | word | row bytes | table or ints ... | rows for member 0, member 1, ... |

A rank writes nothing but its own region and its own epoch line. It fills a half, and last of all
stores the *word*, `epoch and exchange number` in one int64; its peers wait for exactly that value.

Why two halves are enough: a rank reuses a half in exchange n + 2, after it has seen the word of
exchange n + 1 of everybody who reads what it sent in exchange n (`receivers`); a peer stores that
word only when it has done with what it read in exchange n. Channels know nothing of each other.

Why a zombie (a process of an older epoch that runs on) does no harm: its words are never equal to
those of a later epoch; consecutive epochs use different areas; and before it writes anything it
looks at the epoch lines and leaves by itself when anyone has gone further.

Store order: a reader that sees the word must see the rows stored before it. x86 keeps the order of
stores and of loads (Intel SDM vol. 3, 9.2.2; glibc ends its non-temporal copies with a fence), and
an aligned 8-byte access is atomic. Other machines would need barriers Python does not offer, so
they are refused.
"""

import mmap
import os
import platform
import struct
from array import array
from collections.abc import Sequence
from multiprocessing import reduction
from typing import Protocol

import torch

from revivemoe.comm.fence import DomainLeft
from revivemoe.comm.transport import EVERYBODY, MAX_INTS, Flow, Transport
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId

_MAGIC = 0x7265_7669_7665_0001
_LINE = 64
_PAGE = 4096
_TABLE = 2
"""Index of the first table entry in a half's header, in int64 words (0: word, 1: row bytes)."""
_INTS = -1
"""Stands for the row bytes in an exchange of ints, which has no rows."""
_FIXED = struct.Struct("=4q")
_EXCHANGE_BITS = 40
"""10^12 exchanges per epoch: years at 10 000 a second. Leaves 2^23 epochs."""


def round_up(num_bytes: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-num_bytes // to) * to


def _half_header_bytes(num_ranks: int) -> int:
    return round_up(8 * (_TABLE + max(MAX_INTS, num_ranks + 1)), _LINE)


def _segment_header_bytes(num_ranks: int) -> int:
    return round_up(_LINE * (1 + num_ranks), _PAGE)


def region_bytes_for(num_ranks: int, payload_bytes: int) -> int:
    """Size of a region whose every exchange carries at most `payload_bytes` out of one rank."""
    return round_up(2 * (_half_header_bytes(num_ranks) + round_up(payload_bytes, _LINE)), _PAGE)


def create_segment(num_ranks: int, region_bytes: int, channels: int = 1) -> int:
    """A new anonymous segment for rank ids 0 .. num_ranks - 1; returns its file descriptor.

    Sized now, at twice `channels * num_ranks * region_bytes`, though a page costs memory only once
    it is written. It has no name and is gone with the last process that holds it. Hand the
    descriptor to each rank process; close it when no further rank will be started. Raises OSError.
    """
    region_bytes = round_up(region_bytes, _PAGE)
    num_bytes = _segment_header_bytes(num_ranks) + 2 * channels * num_ranks * region_bytes
    header = _FIXED.pack(_MAGIC, num_ranks, region_bytes, channels)
    return create_memfd("revivemoe-domain", num_bytes, header)


def create_memfd(name: str, num_bytes: int, header: bytes) -> int:
    """Anonymous memory, zeros behind the header; returns its file descriptor. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, num_bytes)
        os.pwrite(fd, header, 0)
    except OSError:
        os.close(fd)
        raise
    return fd


class _Duplicate(Protocol):
    """Of a descriptor, on its way to another process."""

    def detach(self) -> int: ...


class HandedFd:
    """A descriptor that is carried into a process when it is among the arguments it is started with
    (`multiprocessing`, spawn or fork server). `fd` is valid on either side.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __getstate__(self) -> _Duplicate:
        return reduction.DupFd(self.fd)

    def __setstate__(self, state: _Duplicate) -> None:
        self.fd = state.detach()


class Segment:
    """This process's mapping of the segment. The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        """Raises ValueError on a machine with weak store order, or if `fd` is no such segment."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ValueError(
                f"the shm transport relies on the store order of x86, and this is "
                f"{platform.machine()}: use --transport gloo"
            )
        fixed = _FIXED.unpack(os.pread(fd, _FIXED.size, 0))
        magic, self.num_ranks, self.region_bytes, self.channels = fixed
        if magic != _MAGIC:
            raise ValueError("the descriptor is not a segment made by create_segment")
        mapping = mmap.mmap(fd, 0)
        self.words = memoryview(mapping).cast("q")
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    def epoch_line(self, rank: RankId) -> int:
        """Index into `words` of the epoch that `rank` has entered, plus one."""
        return _LINE * (1 + rank) // 8

    def half_offset(self, rank: RankId, epoch: Epoch, channel: int, parity: int) -> int:
        """Byte offset of one half of the region of `rank`."""
        region = ((epoch % 2) * self.channels + channel) * self.num_ranks + rank
        half_bytes = self.region_bytes // 2
        start = _segment_header_bytes(self.num_ranks) + region * self.region_bytes
        return start + parity * half_bytes


class ShmTransport(Transport):
    """See the module."""

    def __init__(
        self,
        segment: Segment,
        waiter: Waiter,
        epoch: Epoch,
        members: tuple[RankId, ...],
        me: RankId,
        channel: int = 0,
    ) -> None:
        """Enter one channel. Raises DomainLeft if a member has gone further than `epoch` already.

        A rank enters channel 0 first, and each channel of an epoch once.
        """
        super().__init__(waiter, epoch, members, me, torch.device("cpu"))
        self._segment: Segment | None = segment
        self._words = segment.words
        self._bytes = segment.bytes
        self._word = (epoch + 1) << _EXCHANGE_BITS
        self._row_bytes = 0
        self._header_bytes = _half_header_bytes(segment.num_ranks)
        self._payload_bytes = segment.region_bytes // 2 - self._header_bytes
        self._halves = [
            [segment.half_offset(rank, epoch, channel, parity) for rank in members]
            for parity in (0, 1)
        ]
        self._epoch_lines = [segment.epoch_line(RankId(r)) for r in range(segment.num_ranks)]
        self._leave_if_superseded()
        mine = segment.epoch_line(me)
        assert channel or self._words[mine] <= epoch, f"rank {me} enters epoch {epoch} twice"
        self._words[mine] = epoch + 1
        self._everybody = tuple(range(len(members)))
        self._receivers: list[Sequence[int]] = [(), ()]
        """Who reads what lies in each half."""
        self._senders = self._everybody
        self._rows_from: Sequence[int] | None = None

    def all_gather_ints(self, row: Sequence[int]) -> list[list[int]]:
        assert len(row) <= MAX_INTS, f"{len(row)} ints: more than {MAX_INTS}"
        table = self._open(_INTS, self._everybody)
        self._words[table : table + len(row)] = array("q", row)
        self.send()
        self._wait_for(self._everybody, "exchange of ints")
        return [self._table(i, len(row)) for i in range(self.size)]

    def outbox(
        self,
        row_bytes: int,
        rows_to: Sequence[int],
        rows_from: Sequence[int] | None = None,
        flow: Flow = EVERYBODY,
    ) -> torch.Tensor:
        num_rows = sum(rows_to)
        assert num_rows * row_bytes <= self._payload_bytes, (
            f"{num_rows} rows of {row_bytes} bytes exceed the region ({self._payload_bytes} bytes)"
        )
        table = self._open(row_bytes, self._all_or(flow.receivers))
        self._senders, self._rows_from = self._all_or(flow.senders), rows_from
        starts = array("q", [0])
        for rows in rows_to:
            starts.append(starts[-1] + rows)
        self._words[table : table + len(starts)] = starts
        self._row_bytes = row_bytes
        return self._rows(self.index, 0, num_rows)

    def send(self) -> None:
        self._words[self._header(self.index)] = self._word  # last of all stores

    def receive(self) -> list[torch.Tensor]:
        senders, rows_from = self._senders, self._rows_from
        self._wait_for(senders, "all-to-all")
        pieces = []
        for i in range(self.size):
            if i not in senders:
                pieces.append(self._rows(i, 0, 0))
                continue
            assert self._words[self._header(i) + 1] == self._row_bytes, "members differ in phase"
            start, end = self._table(i, self.size + 1)[self.index : self.index + 2]
            assert rows_from is None or rows_from[i] == end - start
            pieces.append(self._rows(i, start, end))
        return pieces

    def _all_or(self, ranks: tuple[int, ...] | None) -> tuple[int, ...]:
        return self._everybody if ranks is None else ranks

    def close(self) -> None:
        """Leave. The mapping itself goes with the `Segment`."""
        self._segment = None

    def _leave_if_superseded(self) -> None:
        """A zombie leaves before it writes, even if no fence has reached it."""
        highest = max([self._words[line] for line in self._epoch_lines]) - 1
        if highest > self.epoch:
            raise DomainLeft(f"epoch {self.epoch} is over: a rank has entered epoch {highest}")

    def _open(self, row_bytes: int, receivers: Sequence[int]) -> int:
        """Turn to the other half, once all have read what it held; returns the index of its table.

        Whoever waits for its peers in every exchange finds that they have.
        """
        assert self._segment is not None, "the transport is closed"
        self._waiter.check_fence()
        self._leave_if_superseded()
        self._await_readers()
        self._word += 1
        self._receivers[self._word % 2] = receivers
        header = self._header(self.index)
        self._words[header + 1] = row_bytes
        return header + _TABLE

    def _await_readers(self) -> None:
        """Those who read exchange n must have stored their word of n + 1, the present one."""
        words, word = self._words, self._word
        pending = [self._header(i) for i in self._receivers[(word + 1) % 2]]

        def ready() -> bool:
            while pending and words[pending[-1]] >= word:
                pending.pop()
            return not pending

        def silent() -> tuple[RankId, ...]:
            late = set(pending)
            return tuple(r for i, r in enumerate(self.members) if self._header(i) in late)

        self._waiter.until(ready, "rows to be read", silent)

    def _wait_for(self, senders: Sequence[int], waited_for: str) -> None:
        words, word = self._words, self._word
        pending = [(self._header(i), self.members[i]) for i in senders]

        def ready() -> bool:
            while pending and words[pending[-1][0]] == word:
                pending.pop()
            return not pending

        def silent() -> tuple[RankId, ...]:
            return tuple(rank for header, rank in pending if words[header] != word)

        self._waiter.until(ready, f"{waited_for} {word % (1 << _EXCHANGE_BITS)}", silent)

    def _header(self, index: int) -> int:
        """Index into `words` of the current half of a member."""
        return self._halves[self._word % 2][index] // 8

    def _table(self, index: int, width: int) -> list[int]:
        start = self._header(index) + _TABLE
        return self._words[start : start + width].tolist()

    def _rows(self, index: int, start: int, end: int) -> torch.Tensor:
        """Rows [start, end) of the current half of a member: a view of the segment."""
        offset = self._halves[self._word % 2][index] + self._header_bytes
        row_bytes = self._row_bytes
        size, stride = (end - start, row_bytes), (row_bytes, 1)
        return self._bytes.as_strided(size, stride, offset + start * row_bytes)
