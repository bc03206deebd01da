"""A rank reads its own experts and no others, into the slots it was told."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from revivemoe.checkpoint import ARCHS
from revivemoe.ids import LayerId
from revivemoe.model import tensor_files
from revivemoe.model.load import (
    CheckpointError,
    LoadedModel,
    checkpoint_tensors,
    construct,
    load_model,
)
from revivemoe.model.runner import register_hooks

register_hooks()
CPU = torch.device("cpu")
FUSED = ("gate_up_proj", "down_proj")


def layers_of(arch: str) -> list[LayerId]:
    first = 1 if arch in ("deepseek_v3", "glm4_moe") else 0
    return [LayerId(layer) for layer in range(first, 4)]


def loaded(path: Path, arch: str, held: tuple[int, ...]) -> LoadedModel:
    return load_model(path, dict.fromkeys(layers_of(arch), held), torch.float32, CPU)


def experts_of(model: Any, layer: int) -> Any:
    """The experts module of the same model in `transformers`."""
    (found,) = (
        m for n, m in model.named_modules() if f".{layer}." in f"{n}." and n.endswith(".experts")
    )
    return found


@pytest.fixture(scope="module")
def originals(made: dict[str, Path]) -> dict[str, Any]:
    return {arch: AutoModelForCausalLM.from_pretrained(made[arch]) for arch in ARCHS}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes read by tensor name."""
    read: dict[str, int] = {}

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            part: torch.Tensor = self.inner[index]
            read[self.name] = read.get(self.name, 0) + part.nbytes
            return part

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    original = tensor_files.safe_open

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = original(*args, **kwargs)

        def __enter__(self) -> "Opened":
            self.handle = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.handle.keys())

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.handle.get_slice(name))

    monkeypatch.setattr(tensor_files, "safe_open", Opened)
    return read


def expert_keys(path: Path) -> dict[str, int | None]:
    """Expert of each expert tensor in the checkpoint; None where all are in one."""
    found: dict[str, int | None] = {}
    for name in checkpoint_tensors(path):
        if ".experts." in name:
            number = name.split(".experts.")[1].split(".")[0]
            found[name] = int(number) if number.isdigit() else None
    return found


# ---- what is in the slots -------------------------------------------------------------------


@pytest.mark.parametrize("held", [(0, 1, 2, 3), (9, 3, 15), (5, -1, 2, -1)], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_slots_hold_their_experts(
    made: dict[str, Path], originals: dict[str, Any], arch: str, held: tuple[int, ...]
) -> None:
    model = loaded(made[arch], arch, held)
    assert list(model.experts) == layers_of(arch)
    assert model.slots_per_rank == len(held)
    for layer, module in model.experts.items():
        theirs = experts_of(originals[arch], layer)
        for name, param in module.named_parameters(recurse=False):
            assert len(param) == len(held)
            for slot, expert in enumerate(held):
                whole = getattr(theirs, name)
                expected = torch.zeros_like(whole[0]) if expert < 0 else whole[expert]
                assert torch.equal(param[slot], expected), (layer, name, slot)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_dense_part_is_whole(
    made: dict[str, Path], originals: dict[str, Any], arch: str
) -> None:
    ours = dict(loaded(made[arch], arch, (0,)).model.named_parameters())
    for name, theirs in originals[arch].named_parameters():
        if ".experts." not in name:
            assert torch.equal(ours[name], theirs), name
    for name, buffer in originals[arch].named_buffers():
        assert torch.equal(dict(loaded_buffers(made[arch], arch))[name], buffer), name


def loaded_buffers(path: Path, arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield from loaded(path, arch, (0,)).model.named_buffers()


def test_layers_may_hold_different_experts(
    made: dict[str, Path], originals: dict[str, Any]
) -> None:
    slots = {LayerId(i): (i, 10 + i) for i in range(4)}
    model = load_model(made["mixtral"], slots, torch.float32, CPU)
    for layer, module in model.experts.items():
        theirs = experts_of(originals["mixtral"], layer)
        for name in FUSED:
            assert torch.equal(getattr(module, name), getattr(theirs, name)[[layer, 10 + layer]])


def test_the_type_asked_for(made: dict[str, Path]) -> None:
    slots = dict.fromkeys(layers_of("deepseek_v3"), (3, -1))
    model = load_model(made["deepseek_v3"], slots, torch.bfloat16, CPU)
    for module in model.experts.values():
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    router = model.routers[LayerId(1)][0].gate
    assert router.e_score_correction_bias.dtype == torch.float32, "published so, and needed so"


def test_routers_are_found(made: dict[str, Path]) -> None:
    for arch in ARCHS:
        for parent, name in loaded(made[arch], arch, (0,)).routers.values():
            assert getattr(parent, name).weight.shape == (16, 64)


# ---- what is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_only_this_ranks_experts_are_read(
    made: dict[str, Path], reads: dict[str, int], arch: str
) -> None:
    held = (3, 7, -1)
    loaded(made[arch], arch, held)
    read = {expert_keys(made[arch])[name] for name in reads if ".experts." in name}
    assert read == {3, 7}
    files = checkpoint_tensors(made[arch])
    assert reads.keys() >= {name for name in files if ".experts." not in name}
    sizes = {n: t.nbytes for f in {f.file for f in files.values()} for n, t in load_file(f).items()}
    assert all(count == sizes[name] for name, count in reads.items()), "each once, and whole"


def fuse(path: Path) -> None:
    """Rewrite with one tensor for all experts of a layer, as some families publish it."""
    model = AutoModelForCausalLM.from_pretrained(path)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for old in path.glob("*.safetensors*"):
        old.unlink()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def test_rows_of_a_fused_layout(
    made: dict[str, Path], originals: dict[str, Any], tmp_path: Path, reads: dict[str, int]
) -> None:
    path = Path(shutil.copytree(made["qwen3_moe"], tmp_path / "model"))
    fuse(path)
    assert set(expert_keys(path).values()) == {None}
    model = loaded(path, "qwen3_moe", (9, -1, 3))
    for layer, module in model.experts.items():
        theirs = experts_of(originals["qwen3_moe"], layer)
        for name in FUSED:
            ours, whole = getattr(module, name), getattr(theirs, name)
            assert torch.equal(ours[[0, 2]], whole[[9, 3]])
            assert not ours[1].any()
            read = [n for key, n in reads.items() if f"layers.{layer}." in key and name in key]
            assert read == [2 * whole[0].nbytes], "two rows of sixteen"


def test_one_file_or_many(made: dict[str, Path], tmp_path: Path) -> None:
    assert len(list(made["qwen3_moe"].glob("*.safetensors"))) > 1
    path = Path(shutil.copytree(made["qwen3_moe"], tmp_path / "model"))
    state = {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}
    for old in path.glob("*.safetensors*"):
        old.unlink()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert set(checkpoint_tensors(path)) == set(checkpoint_tensors(made["qwen3_moe"]))
    ours, theirs = (
        loaded(p, "qwen3_moe", (4,)).model.state_dict() for p in (path, made["qwen3_moe"])
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


# ---- what is wrong --------------------------------------------------------------------------


@pytest.fixture
def spoiled(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["qwen3_moe"], tmp_path / "model"))


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to every tensor by name; None drops it."""
    weight_map = {}
    for shard in sorted(path.glob("*.safetensors")):
        changed = {n: change(n, t) for n, t in load_file(shard).items()}
        kept = {n: t for n, t in changed.items() if t is not None}
        save_file(kept, shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(kept, shard.name))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        loaded(path, "qwen3_moe", (3, 7))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "layers.2.self_attn.q_proj.weight", "layers.1.mlp.gate.weight"]
)
def test_a_dense_tensor_that_is_missing(spoiled: Path, name: str) -> None:
    rewrite(spoiled, lambda n, t: None if n.endswith(name) else t)
    message = refusal(spoiled)
    assert str(spoiled) in message
    assert name in message
    assert "incomplete or mismatched" in message


def test_an_expert_of_ours_that_is_missing(spoiled: Path) -> None:
    rewrite(spoiled, lambda n, t: None if ".layers.2.mlp.experts.7.up_proj" in n else t)
    assert "layers.2.mlp.experts" in refusal(spoiled)


def test_somebody_elses_expert_may_be_missing(spoiled: Path) -> None:
    rewrite(spoiled, lambda n, t: None if ".layers.2.mlp.experts.8." in n else t)
    loaded(spoiled, "qwen3_moe", (3, 7))


def test_a_shape_that_does_not_fit(spoiled: Path) -> None:
    rewrite(spoiled, lambda n, t: t[:5].clone() if n == "model.norm.weight" else t)
    assert "model.norm.weight has shape [5] instead of [64]" in refusal(spoiled)


def test_no_weights_at_all(spoiled: Path) -> None:
    for old in spoiled.glob("*.safetensors*"):
        old.unlink()
    assert "holds neither model.safetensors nor" in refusal(spoiled)


def test_a_model_without_experts(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM has no experts module"):
        load_model(tmp_path, {}, torch.float32, CPU)


def test_a_type_of_model_nobody_knows(spoiled: Path) -> None:
    config = json.loads((spoiled / "config.json").read_text())
    (spoiled / "config.json").write_text(json.dumps({**config, "model_type": "nobody_knows"}))
    assert "nobody_knows" in refusal(spoiled)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "magic", "rope_theta": 10000.0}},
        {"hidden_act": "nope"},
        {"pad_token_id": 5000},
        {"moe_intermediate_size": "wide"},
    ],
)
def test_what_cannot_be_built_is_one_line(
    made: dict[str, Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    """These came out as tracebacks of every rank."""
    path = tmp_path / "config.json"
    config = json.loads((made["qwen3_moe"] / "config.json").read_text())
    path.write_text(json.dumps(config | fields))
    with pytest.raises((CheckpointError, ValueError)) as raised:
        construct(tmp_path, torch.float32)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)
