"""Experts' rows from one process's slots to another's, over a real socket."""

import secrets
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import torch
import zmq
from unit.memberships import membership, placed

from revivemoe.executor import weights
from revivemoe.executor.weights import PeerSource, Rows, WeightServer, pack, unpack
from revivemoe.ids import ExpertId, LayerId, RankId

ME, PEER, OTHER = RankId(0), RankId(1), RankId(2)
LAYER = LayerId(3)
MEMBERS = membership(placed({ME: ((0,),), PEER: ((1,),), OTHER: ((1,),)}, 4, [LAYER]))
ROWS = {
    "gate_up": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "down": torch.randn(2, 3),
}


def same(a: Rows, b: Rows) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def endpoint() -> str:
    return f"ipc://@test-weights-{secrets.token_hex(4)}"


@pytest.fixture
def served(endpoint: str) -> Iterator[str]:
    def find(layer: LayerId, expert: ExpertId) -> Rows | None:
        return ROWS if (layer, expert) == (LAYER, 1) else None

    with WeightServer(endpoint, find):
        yield endpoint


def test_rows_survive_the_wire() -> None:
    got = unpack(pack(ROWS))
    assert got is not None
    assert same(got, ROWS)
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in ROWS.items()}
    assert unpack(pack(None)) is None


def test_a_replica_comes_from_the_peer_that_holds_it(served: str) -> None:
    got = PeerSource(MEMBERS, {PEER: served}, ME).fetch(LAYER, ExpertId(1))
    assert got is not None
    assert same(got, ROWS)


def test_nobody_else_is_asked_for_what_only_we_hold(served: str) -> None:
    assert PeerSource(MEMBERS, {ME: served}, ME).fetch(LAYER, ExpertId(0)) is None


def test_a_peer_that_does_not_have_it_yet_says_so(served: str) -> None:
    """By the map it will hold it; it is loading it itself."""
    assert PeerSource(MEMBERS, {PEER: served}, ME).fetch(LAYER, ExpertId(2)) is None


def test_a_silent_peer_is_passed_over_and_not_asked_again(
    served: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PEER_TIMEOUT_S", 0.2)
    source = PeerSource(MEMBERS, {PEER: f"{endpoint}-nobody", OTHER: served}, ME)
    for limit_s in (2.0, 0.15):
        began = time.monotonic()
        got = source.fetch(LAYER, ExpertId(1))
        assert got is not None
        assert same(got, ROWS)
        assert time.monotonic() - began < limit_s


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1 no message"],
        [b""],
        [msgspec.msgpack.encode((LAYER, "one"))],
        [msgspec.msgpack.encode((LAYER, 1)), b"and more"],
        [msgspec.msgpack.encode((99, 1))],
    ],
    ids=["garbage", "empty", "another type", "two frames", "no such layer"],
)
def test_a_request_that_cannot_be_answered_does_not_end_the_server(
    endpoint: str, frames: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    def find(layer: LayerId, expert: ExpertId) -> Rows | None:
        return {LAYER: ROWS}[layer]

    with (
        WeightServer(endpoint, find),
        zmq.Context() as context,
        context.socket(zmq.REQ) as stranger,
    ):
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(endpoint)
        stranger.send_multipart(frames)
        assert stranger.poll(2000)
        assert unpack(stranger.recv()) is None
        assert PeerSource(MEMBERS, {PEER: endpoint}, ME).fetch(LAYER, ExpertId(1)) is not None
    assert "requests that cannot be answered: 1, the last: " in capfd.readouterr().err


def test_the_server_ends_with_its_block(endpoint: str) -> None:
    with WeightServer(endpoint, lambda layer, expert: None):
        assert "weights" in {t.name for t in threading.enumerate()}
    assert "weights" not in {t.name for t in threading.enumerate()}


def ask(endpoint: str, question: bytes) -> bytes:
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send(question)
        assert socket.poll(2000), "no answer"
        return socket.recv()


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("CUDA"), KeyError(9)], ids=repr)
def test_one_answer_that_fails_is_not_the_servers_end(endpoint: str, failure: Exception) -> None:
    def find(layer: LayerId, expert: ExpertId) -> Rows | None:
        if expert == 0:
            raise failure
        return ROWS

    with WeightServer(endpoint, find):
        assert ask(endpoint, b"\xc1") == b"", "no message at all"
        assert PeerSource(MEMBERS, {PEER: endpoint}, ME)._ask(PEER, (LAYER, ExpertId(0))) is None
        got = PeerSource(MEMBERS, {PEER: endpoint}, ME).fetch(LAYER, ExpertId(1))
        assert got is not None
        assert same(got, ROWS)


def test_a_peer_that_answers_with_no_rows_is_passed_over(
    served: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PeerSource(MEMBERS, {PEER: "nowhere", OTHER: served}, ME)
    got = source.fetch(LAYER, ExpertId(1))
    assert got is not None, "of the other one: the first has no address that can be reached"
    monkeypatch.setattr(weights, "pack", lambda rows: b"no tensors")
    assert PeerSource(MEMBERS, {PEER: served}, ME).fetch(LAYER, ExpertId(1)) is None
