"""Loads that fail: told in one line, and the rank is as it was but for the slots it was to fill."""

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
import torch
import zmq
from safetensors import SafetensorError
from unit.executor.test_kv_size import SPEC
from unit.memberships import membership

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.core.effects import Left, Load, LoadFailed
from revivemoe.core.progress import Progress
from revivemoe.executor import main
from revivemoe.executor.loading import Loader
from revivemoe.ids import Epoch, ExpertId, Incarnation, LayerId, RankId, SlotId
from revivemoe.membership.placement import ExpertPlacement, Table
from revivemoe.messages.commands import DomainSpec, LoadExperts, SlotLoad
from revivemoe.messages.reports import ExpertsLoaded, Fatal
from revivemoe.model import expert_worker
from revivemoe.model.experts import MoeLayer
from revivemoe.model.load import CheckpointError
from revivemoe.model.runner import DenseSpec, ModelRunner

ME = (RankId(0), Incarnation(1))
HELD, WANTED = (0, 1, -1), (0, 2, 3)
"""In the slots of each layer."""
FAILURES = {
    "memory": (MemoryError(), "MemoryError"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "OutOfMemoryError: CUDA"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "RuntimeError: Def"),
    "disk": (OSError(5, "Input/output error"), r"\[Errno 5\] Input/output error"),
    "file": (SafetensorError("incomplete metadata"), "SafetensorError: incomplete metadata"),
    "checkpoint": (CheckpointError("lacks experts [2]"), "lacks experts"),
    "tensor": (KeyError("model.layers.0"), "KeyError: 'model.layers.0'"),
}
failing = pytest.mark.parametrize(("failure", "says"), FAILURES.values(), ids=FAILURES)


class Fences:
    """The domains of a rank: whether its epoch has been fenced."""

    def __init__(self) -> None:
        self.before_fence = 1000
        """So many more looks at it."""

    def check_fence(self, epoch: Epoch) -> None:
        self.before_fence -= 1
        if self.before_fence < 0:
            raise Left("fenced")


class Bench:
    """The loader of an expert rank, and a reader that may fail."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        info = inspect_checkpoint(path)
        self.layers = tuple(map(LayerId, info.moe_layers))
        slots = dict.fromkeys(self.layers, HELD)
        cpu = torch.device("cpu")
        self.runner = ModelRunner(path, slots, 16, info.top_k, torch.float32, cpu, attention=False)
        self.slots, self.fences = self.runner.worker.slots, Fences()
        progress = Progress(lambda: 0.0)
        self.loader = Loader(self.runner, self.fences, progress, ME)  # type: ignore[arg-type]
        reader = self.runner.worker._reader
        self._read = reader.each
        self.before: Callable[[], object] = lambda: None
        """Called before anything is read."""
        monkeypatch.setattr(reader, "each", self._reads)
        monkeypatch.setattr(expert_worker, "PORTION_BYTES", 1)

    def _reads(self, *asked: Any) -> Any:
        self.before()
        return self._read(*asked)

    def fails(self, failure: BaseException, after: int = 0) -> None:
        """All reads but the first ones."""
        left = [after]

        def fail() -> None:
            left[0] -= 1
            if left[0] < 0:
                raise failure

        self.before = fail

    def works(self) -> None:
        self.before = lambda: None

    def wanted(self, row: tuple[int, ...] = WANTED) -> Load:
        table: Table = (row,) * len(self.layers)
        placement = ExpertPlacement(16, self.layers, {ME[0]: table})
        return Load(membership(placement), table, DomainSpec("literal"))

    def contents(self, slot: int) -> dict[str, torch.Tensor]:
        rows = self.runner.exchange.layers[self.layers[0]].read_slot(SlotId(slot))
        return {name: row.clone() for name, row in rows.items()}

    def beside(self) -> LoadExperts:
        first = self.layers[0]
        return LoadExperts(
            7, tuple(SlotLoad(first, SlotId(s), ExpertId(e)) for s, e in ((1, 2), (2, 3)))
        )


@pytest.fixture
def bench(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(made["qwen3_moe"], monkeypatch)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- before a resume ------------------------------------------------------------------------


@failing
def test_a_load_for_an_epoch_fails(bench: Bench, failure: Exception, says: str) -> None:
    before, num_bytes = bench.contents(0), bench.runner.num_bytes()
    bench.fails(failure, after=1)
    with pytest.raises(LoadFailed, match=f"^{says}") as raised:
        bench.loader.load(bench.wanted())
    assert "\n" not in str(raised.value)
    rest = (HELD,) * (len(bench.layers) - 1)
    assert bench.slots.table == ((0, 2, -1), *rest), "what came before it is there"
    assert same(bench.contents(0), before)
    assert bench.runner.num_bytes() == num_bytes
    bench.works()
    assert sum(bench.loader.load(bench.wanted()).sources.values()) == 2 * len(bench.layers) - 1
    assert bench.slots.table == (WANTED,) * len(bench.layers)


def test_an_error_of_our_own_is_not_hidden(bench: Bench) -> None:
    for failure in (AssertionError("shapes"), RuntimeError("shapes"), TypeError("shapes")):
        bench.fails(failure)
        with pytest.raises(type(failure), match="shapes"):
            bench.loader.load(bench.wanted())


def test_a_load_cut_short_by_a_fence_is_told_as_it_is(bench: Bench) -> None:
    bench.fences.before_fence = 1
    with pytest.raises(Left):
        bench.loader.load(bench.wanted())
    assert bench.slots.table == ((0, 2, -1), *(HELD,) * (len(bench.layers) - 1))


def test_what_was_half_read_is_let_go_of(bench: Bench) -> None:
    read: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        half = torch.empty(1000)
        read.append(weakref.ref(half))
        raise MemoryError

    bench.before = fail
    with pytest.raises(LoadFailed) as raised:
        bench.loader.load(bench.wanted())
    assert raised.value.__context__ is None, "whose traceback would keep it"
    assert [ref() for ref in read] == [None]


def test_shards_are_added_all_or_none(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = inspect_checkpoint(made["deepseek_v3"])
    dense, cpu = DenseSpec((LayerId(0),), 4, (0,)), torch.device("cpu")
    made_of = (made["deepseek_v3"], {}, 16, info.top_k, torch.float32, cpu)
    runner = ModelRunner(*made_of, attention=True, dense=dense)
    reader, read = runner._dense_reader, list[int]()

    def fail(files: Any, layer: LayerId, shard: int) -> Any:
        read.append(shard)
        if shard == 2:
            raise MemoryError
        return {}

    monkeypatch.setattr(reader, "_read", fail)
    with pytest.raises(MemoryError):
        runner.load_shards((0, 1, 2))
    assert read == [1, 2]
    assert list(runner.exchange.dense[LayerId(0)].shards) == [0]


# ---- beside the steps -----------------------------------------------------------------------


def loaded_beside(bench: Bench) -> ExpertsLoaded:
    answers: SimpleQueue[ExpertsLoaded] = SimpleQueue()
    bench.loader.load_beside(bench.beside(), answers.put)
    return answers.get(timeout=20)


ENDS = {"exit": (SystemExit(3), "SystemExit: 3"), "own": (AssertionError("x"), "AssertionError: x")}


@pytest.mark.parametrize(
    ("failure", "says"), [*FAILURES.values(), *ENDS.values()], ids=[*FAILURES, *ENDS]
)
def test_a_load_beside_the_steps_is_answered_however_it_ends(
    bench: Bench, failure: BaseException, says: str
) -> None:
    bench.fails(failure, after=1)
    answer = loaded_beside(bench)
    assert (answer.rank, answer.request) == (ME[0], 7)
    assert answer.error is not None
    assert "\n" not in answer.error
    assert answer.error.startswith(says.replace("\\", ""))
    rest = (HELD,) * (len(bench.layers) - 1)
    assert bench.slots.table == ((0, 2, -1), *rest)
    bench.works()
    assert loaded_beside(bench).error is None
    assert bench.slots.table == (WANTED, *rest)


def test_its_slots_are_empty_from_the_command_on(bench: Bench) -> None:
    go_on = threading.Event()
    bench.before = go_on.wait
    answers: SimpleQueue[ExpertsLoaded] = SimpleQueue()
    bench.loader.load_beside(bench.beside(), answers.put)
    assert bench.slots.table[0] == (0, -1, -1), "it may be overwritten at any time"
    go_on.set()
    assert answers.get(timeout=20).error is None
    assert bench.slots.table[0] == WANTED


def test_an_epoch_that_gives_the_slot_to_another_expert_wins(bench: Bench) -> None:
    go_on, loading = threading.Event(), threading.Event()
    answers: SimpleQueue[ExpertsLoaded] = SimpleQueue()

    def hold() -> None:
        if threading.current_thread() is not threading.main_thread():
            loading.set()
            go_on.wait(20)

    bench.before = hold
    bench.loader.load_beside(bench.beside(), answers.put)
    assert loading.wait(20)
    bench.loader.load(bench.wanted((0, 5, 6)))
    go_on.set()
    error = answers.get(timeout=20).error
    assert error is not None
    assert error.startswith("SlotTaken: slot 1 of layer")
    assert bench.slots.table == ((0, 5, 6),) * len(bench.layers)


def test_a_thread_that_cannot_be_started_is_an_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert loaded_beside(bench).error == "RuntimeError: can't start new thread"


# ---- for a new role -------------------------------------------------------------------------


def test_no_memory_for_the_slots_of_a_new_role(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for those of the last layer: the first ones are let go of again."""
    original, last = MoeLayer.resize, bench.layers[-1]

    def resize(self: MoeLayer, num_slots: int) -> None:
        if num_slots and self.layer == last:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, num_slots)

    monkeypatch.setattr(MoeLayer, "resize", resize)
    with pytest.raises(LoadFailed, match="OutOfMemoryError: CUDA out of memory"):
        bench.loader.give_up_attention(5)
    assert bench.slots.table == ()
    assert bench.runner.num_bytes() == 0
    monkeypatch.setattr(MoeLayer, "resize", original)
    bench.loader.give_up_attention(5)
    assert bench.slots.table == ((-1,) * 5,) * len(bench.layers)


# ---- at the start ---------------------------------------------------------------------------


@failing
def test_a_joiner_says_in_one_line_why_it_cannot_start(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, says: str
) -> None:
    def no_model(*_: Any) -> Any:
        raise failure

    monkeypatch.setattr(main, "ModelRunner", no_model)
    monkeypatch.setattr(main, "ControlThread", lambda *_: nullcontext())
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda on: None)
    endpoint = f"ipc://@test-{id(failure)}"
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.bind(endpoint)
        status = main.run_rank(msgspec.structs.replace(SPEC, reports=endpoint), -1, None)
        assert inbox.poll(2000)
        last = msgspec.msgpack.decode(inbox.recv(), type=Fatal)
    bad_checkpoint = isinstance(failure, CheckpointError)
    assert status == (main.USER_ERROR if bad_checkpoint else main.FAILED)
    assert last.user_error == bad_checkpoint
    expected = says if bad_checkpoint else f"weights: {says}"
    assert last.detail.startswith(expected.replace("\\", ""))
    assert "\n" not in last.detail
