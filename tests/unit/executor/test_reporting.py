"""All threads of a rank tell the engine by one way: in order, and whole."""

import secrets
import threading
import time
from collections.abc import Iterator

import msgspec
import zmq

from revivemoe.executor.reporting import ReportSocket
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.reports import Heartbeat, RankStats, Report, Tokens
from revivemoe.messages.tally import Tally

ME = (RankId(0), Incarnation(1))
STEPS = 2000


def test_a_heartbeat_comes_behind_the_tokens_it_counts() -> None:
    endpoint, told, done = f"ipc://@test-{secrets.token_hex(4)}", [Tally()], threading.Event()

    def beat(socket: ReportSocket) -> None:
        while not done.wait(0.0001):
            socket.send(Heartbeat(*ME, 0, RankStats(), holdings=told[0]))

    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.setsockopt(zmq.RCVHWM, 0)
        inbox.bind(endpoint)
        with ReportSocket(endpoint) as socket:
            control = threading.Thread(target=beat, args=(socket,))
            control.start()
            for step in range(1, STEPS + 1):
                socket.send(Tokens(*ME, Epoch(1), step, []))
                told[0] = Tally(1, step)
                if step % 50 == 0:
                    time.sleep(0.001)  # the other thread's turn
            done.set()
            control.join()
            arrived = list(until_step(inbox, STEPS))
    step = 0
    for report in arrived:
        if isinstance(report, Tokens):
            assert report.step == step + 1
            step = report.step
        else:
            assert isinstance(report, Heartbeat)
            assert report.holdings is not None
            assert report.holdings.num_output <= step
    assert len(arrived) > STEPS + 10, "there were heartbeats between them"


def until_step(inbox: "zmq.Socket[bytes]", last: int) -> Iterator[Report]:
    decoder = msgspec.msgpack.Decoder(Report)
    while inbox.poll(2000):
        yield (report := decoder.decode(inbox.recv()))
        if isinstance(report, Tokens) and report.step == last:
            return
