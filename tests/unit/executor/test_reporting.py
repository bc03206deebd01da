"""All threads of a rank tell the engine by one way: in order, and whole."""

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import zmq

from revivemoe.executor.reporting import ReportSocket
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.reports import Heartbeat, RankStats, Report, Tokens
from revivemoe.messages.tally import Tally

ME = (RankId(0), Incarnation(1))
BEATS, STEPS_PER_BEAT = 20, 10


def test_a_heartbeat_comes_behind_the_tokens_it_counts() -> None:
    endpoint, step = f"ipc://@test-{secrets.token_hex(4)}", 0
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.bind(endpoint)
        with ReportSocket(endpoint) as socket, ThreadPoolExecutor(1) as control:
            for _ in range(BEATS):
                for _ in range(STEPS_PER_BEAT):
                    step += 1
                    socket.send(Tokens(*ME, Epoch(1), step, []))
                beat = Heartbeat(*ME, 0, RankStats(), holdings=Tally(1, step))
                control.submit(socket.send, beat).result()
            arrived = list(receive(inbox, BEATS + step))
    last = 0
    for report in arrived:
        if isinstance(report, Tokens):
            assert report.step == last + 1
            last = report.step
        else:
            assert isinstance(report, Heartbeat)
            assert report.holdings is not None
            assert report.holdings.num_output == last
    assert last == step


def receive(inbox: "zmq.Socket[bytes]", count: int) -> Iterator[Report]:
    decoder = msgspec.msgpack.Decoder(Report)
    for _ in range(count):
        assert inbox.poll(5000)
        yield decoder.decode(inbox.recv())


def test_a_thread_that_ends_a_little_later_than_the_socket_says_nothing() -> None:
    """A heartbeat into a closed socket ended a clean stop with an exit status once."""
    socket = ReportSocket(f"ipc://@test-{secrets.token_hex(4)}")
    with socket:
        pass
    socket.send(Heartbeat(*ME, 0, RankStats()))
