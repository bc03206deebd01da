"""Cut the connections to one peer, for real: a fault of the link, both ends of which are healthy.

Only for fault injection. The peer's end is found by its process: a TCP socket of ours leads to it
if the peer owns the socket with the mirrored addresses.
"""

import contextlib
import os
import socket

import psutil


def sever(peer_pid: int) -> int:
    """Shut down every TCP connection of this process to another; returns how many there were."""
    ends = psutil.net_connections("tcp")
    their_ends = {end.laddr for end in ends if end.pid == peer_pid}
    cut = 0
    for ours in ends:
        if ours.pid == os.getpid() and ours.raddr and ours.raddr in their_ends:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(ours.fd)) as end:
                end.shutdown(socket.SHUT_RDWR)
                cut += 1
    return cut
