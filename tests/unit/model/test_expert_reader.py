"""Experts reloaded one by one are what `load_model` would have put there, beside a live model."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.solo import SoloRank
from transformers import AutoModelForCausalLM
from unit.memberships import membership

from revivemoe.checkpoint import ARCHS
from revivemoe.checkpoint.files import TensorInfo
from revivemoe.core.limits import RankLimits
from revivemoe.core.slots import SlotTaken
from revivemoe.ids import ExpertId, LayerId, RankId, SlotId
from revivemoe.membership.placement import ExpertPlacement
from revivemoe.messages.commands import SlotLoad
from revivemoe.model import expert_worker, tensor_files
from revivemoe.model.expert_reader import ExpertReader
from revivemoe.model.expert_recipe import copy_rows
from revivemoe.model.load import CheckpointError, load_model
from revivemoe.model.runner import register_hooks
from revivemoe.model.tensor_files import TensorFiles, TensorSlice
from revivemoe.sampling_params import SamplingParams

register_hooks()
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
LAST = LayerId(3)
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip
GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=24, logprobs=3)
PROMPTS = [[7, 8, 9, 10, 11], list(range(20, 50)), [99]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and threads that wait for each other suffer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(*experts: int) -> list[ExpertId]:
    return [ExpertId(e) for e in experts]


def whole(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The last layer's experts module as `load_model` fills it, all experts."""
    slots = dict.fromkeys(map(LayerId, range(4)), tuple(range(16)))
    return load_model(path, slots, dtype, CPU).experts[LAST]


def load(slot: int, expert: int, layer: int = LAST) -> SlotLoad:
    return SlotLoad(LayerId(layer), SlotId(slot), ExpertId(expert))


# ---- the reader -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_equal_those_of_a_load(made: dict[str, Path], arch: str, dtype: torch.dtype) -> None:
    reader, theirs = ExpertReader(made[arch], dtype), whole(made[arch], dtype)
    for experts in (ids(0), ids(9, 3, 15), ids(5), ids(*range(16))):
        rows = reader.read(LAST, experts)
        assert rows.keys() == dict(theirs.named_parameters(recurse=False)).keys()
        for name, tensor in rows.items():
            assert (tensor.dtype, tensor.device) == (dtype, CPU)
            assert torch.equal(tensor, getattr(theirs, name)[experts]), (experts, name)


def fuse(source: Path, target: Path) -> Path:
    """One tensor for all experts of a layer, as some families publish it."""
    shutil.copytree(source, target)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for old in target.glob("*.safetensors*"):
        old.unlink()
    kept = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_shape_alone(original: Callable[..., TensorSlice]) -> Callable[..., TensorSlice]:
    """Of `TensorFiles.slice`: none that was opened to see what is there is read."""

    class Unread:
        def __init__(self, inner: TensorSlice) -> None:
            self.get_shape = inner.get_shape

        def __getitem__(self, index: object) -> torch.Tensor:
            raise AssertionError("read by way of somewhere else")

    return lambda *args: Unread(original(*args))


@pytest.mark.parametrize("fused", [False, True])
def test_only_the_experts_asked_for_are_read(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    path = fuse(made["qwen3_moe"], tmp_path / "m") if fused else made["qwen3_moe"]
    reader, read = ExpertReader(path, torch.float32), []
    original = tensor_files._PlainFile.read_into

    def counted(file: Any, out: torch.Tensor, name: str, *of: int) -> None:
        original(file, out, name, *of)
        read.append((name, out.nbytes))

    monkeypatch.setattr(tensor_files._PlainFile, "read_into", counted)
    monkeypatch.setattr(TensorFiles, "slice", with_shape_alone(TensorFiles.slice))
    rows = reader.read(LAST, ids(9, 4))
    assert sum(count for _, count in read) == sum(t.nbytes for t in rows.values())
    assert all(f"layers.{LAST}." in name and ".experts." in name for name, _ in read)
    if not fused:
        assert {name.split(".experts.")[1].split(".")[0] for name, _ in read} == {"9", "4"}


def test_nothing_of_a_read_is_kept(made: dict[str, Path]) -> None:
    reader = ExpertReader(made["mixtral"], torch.float32)
    reader.read(LAST, ids(3))
    assert all(p.is_meta for p in reader._skeleton.parameters())


def without(path: Path, target: Path, part: str, change: Any) -> Path:
    """A copy in which `change` is applied to the tensors whose names hold `part`; None drops."""
    shutil.copytree(path, target)
    for shard in target.glob("*.safetensors"):
        state = {n: change(t) if part in n else t for n, t in load_file(shard).items()}
        kept = {n: t for n, t in state.items() if t is not None}
        save_file(kept, shard, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("change", [lambda t: None, lambda t: t[:5].clone()], ids=["gone", "short"])
@pytest.mark.parametrize("part", ["up_proj", "gate_proj", "down_proj"])
def test_a_tensor_that_is_missing(
    made: dict[str, Path], tmp_path: Path, part: str, change: Any
) -> None:
    part = f".{LAST}.mlp.experts.7.{part}"
    reader = ExpertReader(without(made["qwen3_moe"], tmp_path / "m", part, change), torch.float32)
    for experts in (ids(7), ids(3, 7)):
        with pytest.raises(CheckpointError, match=rf"lacks experts .*7\] of layer {LAST}"):
            reader.read(LAST, experts)
    reader.read(LAST, ids(8))


@pytest.mark.parametrize("part", ["up_", "down_", ""])
def test_an_index_without_the_tensor(made: dict[str, Path], tmp_path: Path, part: str) -> None:
    """It is in a shard all the same, where `transformers` finds it too."""
    path = Path(shutil.copytree(made["qwen3_moe"], tmp_path / "m"))
    index = path / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace(f".3.mlp.experts.7.{part}", f".3.mlp.experts.77.{part}")
    )
    whole = ExpertReader(made["qwen3_moe"], torch.float32).read(LAST, ids(7))
    read = ExpertReader(path, torch.float32).read(LAST, ids(7))
    assert all(torch.equal(read[name], whole[name]) for name in whole)


def test_a_file_that_has_gone(made: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made["qwen3_moe"], tmp_path / "m"))
    reader = ExpertReader(path, torch.float32)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match="lacks experts"):
        reader.read(LAST, ids(7))


# ---- into slots -----------------------------------------------------------------------------


def outputs(solo: SoloRank) -> list[Any]:
    return solo.run(PROMPTS, GREEDY)


def kept_logits(solo: SoloRank, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of every step over the prompts."""
    kept: list[torch.Tensor] = []

    def keep(phase: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        if phase == "sample":
            kept.append(values.clone())
        return values

    monkeypatch.setattr(solo.runner.exchange, "spoil", keep)
    outputs(solo)
    return kept


def full_placement(solo: SoloRank) -> ExpertPlacement:
    layers = tuple(solo.runner.exchange.layers)
    return ExpertPlacement(16, layers, {RankId(0): (tuple(range(16)),) * len(layers)})


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_mended_gives_the_logits_of_a_whole_one(
    made: dict[str, Path], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kept_logits(SoloRank(made[arch], LIMITS), monkeypatch)
    solo = SoloRank(made[arch], LIMITS, {2: {5}, 3: {0, 15}})
    placement = full_placement(solo)
    slots = solo.runner.worker.slots
    loads = slots.lacking(placement.slots[RankId(0)])
    assert set(loads) == {load(5, 5, layer=2), load(0, 0), load(15, 15)}
    assert slots.lacking(()) == (), "without the expert role"
    before = [p.data_ptr() for p in solo.runner.generator.model.parameters()]
    report = solo.runner.worker.load(loads)
    assert [p.data_ptr() for p in solo.runner.generator.model.parameters()] == before, "in place"
    assert report.sources == {"disk": 3}
    assert report.num_bytes == 3 * 3 * 64 * 32 * 4
    assert slots.lacking(placement.slots[RankId(0)]) == ()
    assert set(slots.table) == {tuple(range(16))}
    dispatcher = solo.runner.exchange.lanes[0].dispatcher
    assert dispatcher is not None
    solo.runner.enter([dispatcher], membership(placement), RankId(0))
    got = kept_logits(solo, monkeypatch)
    assert len(got) == len(expected) > 20
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_another_slot_and_another_expert(made: dict[str, Path]) -> None:
    """A slot that held one expert takes another; its neighbours stay as they are."""
    solo = SoloRank(made["qwen3_moe"], LIMITS)
    theirs, layer = whole(made["qwen3_moe"]), solo.runner.exchange.layers[LAST]
    solo.runner.worker.load([load(2, 11), load(9, 11), load(4, 3)])
    expected = [0, 1, 11, 3, 3, 5, 6, 7, 8, 11, 10, 11, 12, 13, 14, 15]
    assert list(solo.runner.worker.slots.row(LAST)) == expected
    for slot, expert in enumerate(expected):
        for name, row in layer.read_slot(SlotId(slot)).items():
            assert torch.equal(row, getattr(theirs, name)[expert]), (slot, name)


def test_rows_that_do_not_fit_touch_nothing(made: dict[str, Path]) -> None:
    layer = SoloRank(made["qwen3_moe"], LIMITS).runner.exchange.layers[LAST]
    rows = {name: row.clone() for name, row in layer.read_slot(SlotId(9)).items()}
    before = {name: row.clone() for name, row in layer.read_slot(SlotId(2)).items()}
    for wrong in (rows | {"down_proj": torch.zeros(1)}, {"down_proj": rows["down_proj"]}):
        with pytest.raises(AssertionError):
            copy_rows(wrong, layer.read_slot(SlotId(2)))
    assert all(torch.equal(r, before[n]) for n, r in layer.read_slot(SlotId(2)).items())


def test_a_slot_says_what_it_holds_only_when_it_does(made: dict[str, Path]) -> None:
    worker = SoloRank(made["qwen3_moe"], LIMITS).runner.worker
    layer, seen = worker.exchange.layers[LAST], []
    rows = {name: row.clone() for name, row in layer.read_slot(SlotId(9)).items()}

    class Watched(dict[str, Any]):
        nbytes = 0

        def __getitem__(self, name: str) -> Any:
            seen.append(worker.slots.row(LAST)[2])
            return super().__getitem__(name)

    class Source(Peer):
        def fetch(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
            seen.append(worker.slots.row(LAST)[2])
            return Watched(rows)

    worker.load([load(2, 9)], [Source("peer", {9})])
    assert set(seen) == {-1}, "while it is fetched and written it holds nothing"
    assert worker.slots.row(LAST)[2] == 9


def test_a_slot_given_to_a_later_load_is_not_written_by_an_earlier_one(
    made: dict[str, Path],
) -> None:
    """One beside the steps is overtaken by that of a new epoch."""
    worker = SoloRank(made["qwen3_moe"], LIMITS).runner.worker
    begun = worker.begin([load(2, 9), load(3, 9)])
    worker.load([load(3, 7)])
    with pytest.raises(SlotTaken, match="slot 3 of layer 3"):
        worker.load([load(2, 9), load(3, 9)], begun=begun)
    assert worker.slots.row(LAST)[:5] == (0, 1, 9, 7, 4)
    theirs, layer = whole(made["qwen3_moe"]), worker.exchange.layers[LAST]
    for slot, expert in ((2, 9), (3, 7)):
        for name, row in layer.read_slot(SlotId(slot)).items():
            assert torch.equal(row, getattr(theirs, name)[expert])


def test_a_later_load_waits_for_what_is_written_already(made: dict[str, Path]) -> None:
    """A disk that takes its time holds nobody but who wants that very slot."""
    worker = SoloRank(made["qwen3_moe"], LIMITS).runner.worker
    layer, go_on, waiting = worker.exchange.layers[LAST], threading.Event(), threading.Event()
    rows = {name: row.clone() for name, row in layer.read_slot(SlotId(9)).items()}

    class Slow(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            waiting.set()
            assert go_on.wait(10)
            return super().__getitem__(name)

    class Source(Peer):
        def fetch(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
            return Slow(rows)

    def earlier() -> None:
        with pytest.raises(SlotTaken):
            worker.load([load(2, 9)], [Source("peer", {9})])

    threads = [threading.Thread(target=earlier)]
    threads[0].start()
    assert waiting.wait(10)
    threads.append(threading.Thread(target=worker.load, args=([load(2, 7)],)))
    threads[1].start()
    worker.load([load(3, 7)])
    assert worker.find(LAST, ExpertId(7)) is not None
    threads[1].join(0.2)
    assert threads[1].is_alive(), "two would write one slot"
    go_on.set()
    for thread in threads:
        thread.join(10)
    theirs = whole(made["qwen3_moe"])
    assert worker.slots.row(LAST)[2] == 7
    for name, row in layer.read_slot(SlotId(2)).items():
        assert torch.equal(row, getattr(theirs, name)[7])


def test_a_later_load_does_not_wait_for_ever(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_worker, "WRITTEN_WITHIN_S", 0.1)
    worker = SoloRank(made["qwen3_moe"], LIMITS).runner.worker
    begun = worker.begin([load(2, 9)])
    worker._begin_writing(begun, load(2, 9))
    with pytest.raises(TimeoutError, match="slot 2 of layer 3 is still written"):
        worker.load([load(2, 7)])


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_is_no_other_tensors(tmp_path: Path, row: int) -> None:
    """In a file whose next tensor begins where it would be."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 4), "b": torch.ones(2, 4)}, file)
    info, out = TensorInfo(file, (2, 4), "F32"), torch.empty(4)
    with ExitStack() as stack, pytest.raises(SafetensorError, match="is not what it was"):
        TensorFiles(stack).read_into(out, "a", info, row)


class Peer:
    """A source that has some experts, with values of its own."""

    def __init__(self, name: str, experts: set[int]) -> None:
        self.name, self._experts = name, experts

    def fetch(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
        if expert not in self._experts:
            return None
        value = float(len(self.name))
        return {
            "gate_up_proj": torch.full((64, 64), value),
            "down_proj": torch.full((64, 32), value),
        }


def test_sources_are_asked_in_their_order(made: dict[str, Path]) -> None:
    solo = SoloRank(made["qwen3_moe"], LIMITS)
    sources = [Peer("a", {1, 2}), Peer("bb", {2, 3})]
    report = solo.runner.worker.load([load(s, s) for s in (1, 2, 3, 4)], sources)
    assert report.sources == {"a": 2, "bb": 1, "disk": 1}
    layer = solo.runner.exchange.layers[LAST]
    firsts = [float(layer.read_slot(SlotId(s))["down_proj"][0, 0]) for s in (1, 2, 3)]
    assert firsts == [1.0, 1.0, 2.0]


def test_loading_beside_a_running_model_disturbs_nobody(made: dict[str, Path]) -> None:
    """Slot 0 of each layer is empty at first; the other thread fills it over and over."""
    masked = {layer: {0} for layer in range(4)}
    expected = outputs(SoloRank(made["qwen3_moe"], LIMITS, masked))
    solo = SoloRank(made["qwen3_moe"], LIMITS, masked)
    theirs, layer = whole(made["qwen3_moe"]), solo.runner.exchange.layers[LAST]
    stop, errors, rounds = threading.Event(), [], []

    def reload() -> None:
        expert = 0
        while not stop.is_set():
            try:
                solo.runner.worker.load([load(0, expert, layer=k) for k in range(4)])
                for name, row in layer.read_slot(SlotId(0)).items():
                    assert torch.equal(row, getattr(theirs, name)[expert])
            except Exception as error:
                errors.append(error)
                return
            rounds.append(expert)
            expert = (expert + 3) % 16

    thread = threading.Thread(target=reload)
    thread.start()
    got = [outputs(solo) for _ in range(3)]
    stop.set()
    thread.join(timeout=30)
    assert not errors
    assert len(rounds) > 3
    assert got == [expected] * 3
