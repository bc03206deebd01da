"""The TCP connections of this process: which there are, and how to hang them up.

A library that owns a socket may watch it in an event loop of its own: the descriptor is never
closed under it, only shut down, which it sees as the end of the stream.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

FDS = "/proc/self/fd"


def connections() -> frozenset[int]:
    """The inodes of this process's connected TCP sockets."""
    return frozenset(inode for inode, _ in _connected())


def hang_up(inodes: frozenset[int]) -> None:
    """Shut those of these connections down that are still open, in both directions."""
    for inode, end in _connected():
        if inode in inodes:
            with contextlib.suppress(OSError):  # the peer was faster
                end.shutdown(socket.SHUT_RDWR)


def _connected() -> Iterator[tuple[int, socket.socket]]:
    for name in os.listdir(FDS):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            fd = os.dup(int(name))  # from here on it is this socket, whatever becomes of the number
            held = os.fstat(fd)
            if not stat.S_ISSOCK(held.st_mode):
                os.close(fd)
                continue
            with socket.socket(fileno=fd) as end:
                if end.family in (socket.AF_INET, socket.AF_INET6):
                    end.getpeername()
                    yield held.st_ino, end
