"""Float8 checkpoints: read as what they stand for, whoever reads; or refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantise import Scheme, as_meant, block_fp8, compressed, quantise
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from revivemoe.checkpoint.files import tensors
from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.checkpoint.quantization import scale_block
from revivemoe.ids import ExpertId, LayerId
from revivemoe.model.dense import DenseLayer, DenseReader
from revivemoe.model.expert_reader import ExpertReader
from revivemoe.model.host_cache import expert_bytes
from revivemoe.model.load import load_model
from revivemoe.model.runner import register_hooks
from revivemoe.model.tensor_files import dequantize

register_hooks()
CPU = torch.device("cpu")
SCHEMES = {
    "blocks that end beyond the weights": block_fp8(48, 40),
    "blocks": compressed("block", (16, 32)),
    "rows": compressed("channel", (1, 1 << 20)),
    "rows, flat": compressed("channel", (1, 1 << 20), flat=True),
    "whole tensors": compressed("tensor", None),
    "whole tensors, flat": compressed("tensor", None, flat=True),
}
SCHEME = SCHEMES["blocks that end beyond the weights"]
Twins = tuple[Path, Path]


def twins(plain: Path, target: Path, scheme: Scheme) -> Twins:
    return quantise(plain, target / "q", scheme), as_meant(plain, target / "p", scheme)


@pytest.fixture(scope="module")
def deepseek(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return twins(made["deepseek_v3"], tmp_path_factory.mktemp("q"), SCHEME)


def fused(plain: Path, target: Path) -> Path:
    """A checkpoint with one tensor for all experts of a layer."""
    shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    plain_state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(plain_state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def states(paths: Twins, held: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    slots = {LayerId(n): held for n in inspect_checkpoint(paths[1]).moe_layers}
    loaded = [load_model(path, slots, dtype, CPU).model for path in paths]
    return [model.state_dict() for model in loaded if model is not None]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("layout", ["each", "fused"])
def test_a_model_is_what_it_stands_for(
    name: str, layout: str, made: dict[str, Path], tmp_path: Path
) -> None:
    plain = made["qwen3_moe"]
    if layout == "fused":
        plain = fused(plain, tmp_path / "fused")
    paths = twins(plain, tmp_path, SCHEMES[name])
    same(*states(paths, (9, -1, 3), torch.float32))
    same(*states(paths, (9, 3), torch.bfloat16))
    reader, meant = (ExpertReader(path, torch.float32) for path in paths)
    layer, experts = LayerId(2), [ExpertId(5), ExpertId(0)]
    same(reader.read(layer, experts), meant.read(layer, experts))
    sizes = [expert_bytes(path, torch.bfloat16) for path in paths]
    assert sizes[0] == sizes[1] > 0


def test_latent_attention_and_dense_layers(deepseek: Twins) -> None:
    same(*states(deepseek, (0, 7), torch.float32))
    read = []
    for path in deepseek:
        layer = DenseLayer(LayerId(0), 2, CPU)
        DenseReader(path, 2, torch.float32, CPU).load([layer], [1])
        read.append(layer.shards[1])
    same(*read)


def test_transformers_turns_them_back_alike(made: dict[str, Path], tmp_path: Path) -> None:
    """Whole, it would do so only with `accelerate` installed."""
    theirs = Fp8Dequantize(None)._dequantize_one
    path = quantise(made["qwen3_moe"], tmp_path / "q", block_fp8(16, 32))
    compared = 0
    for shard in path.glob("*.safetensors"):
        state = load_file(shard)
        for name in [n for n in state if f"{n}_scale_inv" in state]:
            pair = state[name], state[f"{name}_scale_inv"]
            assert torch.equal(dequantize(*pair, (16, 32)), theirs(*pair, torch.float32))
            compared += 1
    assert compared > 100


def refusal(path: Path, dequantize: bool = True) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (each caller looks at the message)
        inspect_checkpoint(path, dequantize=dequantize)
    message = str(raised.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_it_is_asked_for(deepseek: Twins) -> None:
    assert "is quantised (fp8): --dequantize turns" in refusal(deepseek[0], False)
    quantised, plain = (inspect_checkpoint(path, dequantize=True) for path in deepseek)
    assert quantised.num_parameters == plain.num_parameters > 400_000
    assert quantised.moe_layers == plain.moe_layers
    assert quantised.num_experts == plain.num_experts


COMPRESSED = compressed("tensor", None).config
GROUP: dict[str, Any] = {"targets": ["Linear"]}


def weights(**fields: object) -> dict[str, object]:
    kind = {"type": "float", "num_bits": 8, "symmetric": True}
    return COMPRESSED | {"config_groups": {"a": GROUP | {"weights": kind | fields}}}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "gptq", "bits": 4}, "that cannot be read"),
        ({"bits": 4}, "(unknown): that cannot be read"),
        ("awq", "(awq)"),
        ({"quant_method": "mxfp4"}, "(mxfp4)"),
        ({"quant_method": "fp8", "weight_block_size": "128x128"}, "not two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "not two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "not two whole numbers"),
        (COMPRESSED | {"format": "pack-quantized"}, "its format pack-quantized"),
        (COMPRESSED | {"format": ["x"]}, "its format ['x']"),
        (COMPRESSED | {"quantization_status": "frozen"}, "not stored in their compressed form"),
        (COMPRESSED | {"transform_config": {"a": 1}}, "transformed or sparse"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24"}}, "transformed or sparse"),
        (COMPRESSED | {"config_groups": {}}, "no config_groups"),
        (COMPRESSED | {"config_groups": {"a": 7}}, "compressed-tensors"),
        (COMPRESSED | {"config_groups": {"a": GROUP}}, "how its weights are quantised"),
        (weights(num_bits=4), "weights of type float with 4 bits"),
        (weights(type="int"), "weights of type int with 8 bits"),
        (weights(symmetric=False), "weights of type"),
        (weights(actorder="group"), "weights of type"),
        (weights(block_structure="128x"), "compressed-tensors"),
    ],
)
def test_what_is_not_read(deepseek: Twins, tmp_path: Path, config: object, why: str) -> None:
    shutil.copy(deepseek[1] / "config.json", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    message = refusal(tmp_path)
    assert "is quantised" in message
    assert why in message
    assert "use a bfloat16 or float32 one" in message


Q_PROJ = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("scale", "why"),
    [
        (None, f"lacks the scales of {Q_PROJ}"),
        (torch.ones(7, 5), "scales of shape [7, 5] do not fit weights of"),
        (torch.ones(0, 0), "do not fit"),
        (torch.ones(1, 2, 2), "do not fit"),
        (torch.ones(2, 2, dtype=torch.uint8), "scales of type U8 are not supported"),
    ],
)
def test_scales_that_do_not_fit(
    deepseek: Twins, tmp_path: Path, scale: torch.Tensor | None, why: str
) -> None:
    path = Path(shutil.copytree(deepseek[0], tmp_path / "m"))
    for shard in path.glob("*.safetensors"):
        state = load_file(shard)
        if state.pop(f"{Q_PROJ}_scale_inv", None) is not None:
            if scale is not None:
                state[f"{Q_PROJ}_scale_inv"] = scale
            save_file(state, shard, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    if scale is None:
        del listed["weight_map"][f"{Q_PROJ}_scale_inv"]
        index.write_text(json.dumps(listed))
    assert why in refusal(path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("end", ["_scale_inv", "_scale", None])
def test_numbers_that_another_tool_has_stored_as_integers(
    deepseek: Twins, tmp_path: Path, dtype: torch.dtype, end: str | None
) -> None:
    """The bytes were read as if they were the weights, and their scales not at all."""
    path = Path(shutil.copytree(deepseek[0], tmp_path / "m"))
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for shard in path.glob("*.safetensors"):
        state = load_file(shard)
        if (scale := state.pop(f"{Q_PROJ}_scale_inv", None)) is not None:
            del listed["weight_map"][f"{Q_PROJ}_scale_inv"]
            state[Q_PROJ] = state[Q_PROJ].view(torch.uint8).to(dtype)
            if end is not None:
                state[Q_PROJ + end] = scale
                listed["weight_map"][Q_PROJ + end] = shard.name
            save_file(state, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(listed))
    stored = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}[dtype]
    message = refusal(path)
    assert f"{Q_PROJ} is stored as {stored}" in message
    assert (f"with {Q_PROJ}{end} beside it" in message) == (end is not None)
    assert "convert the checkpoint" in message


@pytest.mark.parametrize(
    ("shape", "scale", "block", "expected"),
    [
        ((384, 128), (3, 1), (128, 128), (128, 128)),
        ((400, 130), (4, 2), (128, 128), (128, 128)),
        ((6, 400, 130), (6, 4, 2), (128, 128), (128, 128)),
        ((384, 128), (384, 1), (128, 128), (1, 128)),
        ((384, 128), (384,), (128, 128), (1, 128)),
        ((384, 128), (1, 1), (128, 128), (384, 128)),
        ((384, 128), (), (128, 128), (384, 128)),
        ((6, 384, 128), (6, 1, 1), (128, 128), (384, 128)),
        ((384, 128), (4, 1), None, (96, 128)),
    ],
)
def test_who_shares_a_scale(shape: Any, scale: Any, block: Any, expected: Any) -> None:
    assert scale_block(shape, scale, block) == expected


@pytest.mark.parametrize("scale", [(4, 1), (2, 1), (3, 2), (384, 2), (1, 128), (384, 128)])
def test_other_blocks_than_the_configurations(scale: tuple[int, int]) -> None:
    """[4, 1] may have been 192 rows twice, each in blocks of 128 and 64: 96 was a guess."""
    with pytest.raises(ValueError, match=r"do not fit weights of \[384, 128\] in blocks of"):
        scale_block((384, 128), scale, (128, 128))


def test_parameters_that_are_called_scales_too(deepseek: Twins, tmp_path: Path) -> None:
    """A router's of its own stays; those of activations and caches go."""
    path = Path(shutil.copytree(deepseek[0], tmp_path / "m"))
    one, expert = torch.ones(1), "model.layers.1.mlp.experts.0.up_proj"
    others = ("model.layers.0.self_attn.k_scale", f"{expert}.input_scale")
    state = {"model.layers.1.router.per_expert_scale": one, **dict.fromkeys(others, one)}
    state = {name: tensor.clone() for name, tensor in state.items()}
    save_file(state, path / "other.safetensors", metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(state, "other.safetensors")
    index.write_text(json.dumps(listed))
    found = tensors(path).keys() - tensors(deepseek[0]).keys()
    assert found == {"model.layers.1.router.per_expert_scale"}


def test_float8_that_the_configuration_does_not_know(deepseek: Twins, tmp_path: Path) -> None:
    path = Path(shutil.copytree(deepseek[0], tmp_path / "m"))
    shutil.copy(deepseek[1] / "config.json", path)
    assert "says nothing of a quantisation" in refusal(path)
