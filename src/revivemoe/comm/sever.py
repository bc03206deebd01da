"""Cut the connections to one peer, for real: a fault of the link, both ends of which are healthy.

Only for fault injection. The peer's end is found by its process: a TCP socket of ours leads to it
if the peer owns the socket with the mirrored addresses.
"""

import contextlib
import os
import socket
from pathlib import Path

_TCP_TABLES = ("net/tcp", "net/tcp6")


def sever(peer_pid: int) -> int:
    """Shut down every TCP connection of this process to another; returns how many there were."""
    mine, theirs = _connections("self"), _connections(str(peer_pid))
    their_ends = {local for local, _ in theirs.values()}
    cut = 0
    for inode, (_, remote) in mine.items():
        if remote in their_ends:
            cut += _shut_down(inode)
    return cut


def _connections(pid: str) -> dict[str, tuple[str, str]]:
    """Inode of each TCP socket of a process: its local and its remote address."""
    owned = set(_sockets(pid))
    found = {}
    for table in _TCP_TABLES:
        with contextlib.suppress(FileNotFoundError):
            for line in Path("/proc", pid, table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in owned:
                    found[fields[9]] = (fields[1], fields[2])
    return found


def _sockets(pid: str) -> dict[str, int]:
    """Inode to descriptor of a process's sockets."""
    folder = Path("/proc", pid, "fd")
    found = {}
    for entry in os.listdir(folder):
        with contextlib.suppress(OSError):
            target = os.readlink(folder / entry)
            if target.startswith("socket:["):
                found[target[8:-1]] = int(entry)
    return found


def _shut_down(inode: str) -> int:
    fd = _sockets("self").get(inode)
    if fd is None:
        return 0
    with socket.socket(fileno=os.dup(fd)) as mine, contextlib.suppress(OSError):
        mine.shutdown(socket.SHUT_RDWR)
        return 1
    return 0
