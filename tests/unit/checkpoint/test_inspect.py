import json
import struct
from pathlib import Path
from typing import Any

import pytest

from revivemoe.checkpoint import ARCHS
from revivemoe.checkpoint.inspect import inspect_checkpoint

CONFIG = {
    "architectures": ["SomeMoeForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
    "eos_token_id": 2,
}


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A file of zeros with these float32 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(end)


def per_expert(layers: int, experts: int) -> dict[str, list[int]]:
    return {
        f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight": [2, 4]
        for layer in range(layers)
        for e in range(experts)
    }


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A sound checkpoint that the tests spoil."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.embed_tokens.weight": [32, 4], **per_expert(2, 3)}
    (tmp_path / "model.safetensors").write_bytes(safetensors(shapes))
    return tmp_path


def edit(model_dir: Path, **fields: Any) -> None:
    config = {**CONFIG, **fields}
    (model_dir / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


def refusal(model_dir: Path) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (each caller looks at the message)
        inspect_checkpoint(model_dir)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_sound_one(model_dir: Path) -> None:
    info = inspect_checkpoint(model_dir)
    assert info.moe_layers == (0, 1)
    assert (info.num_experts, info.top_k) == (3, 2)
    assert (info.vocab_size, info.hidden_size, info.max_positions) == (32, 4, 128)
    assert (info.dtype, info.eos_token_ids) == ("float32", (2,))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_family(made: dict[str, Path], arch: str) -> None:
    info = inspect_checkpoint(made[arch])
    first = 1 if arch in ("deepseek_v3", "glm4_moe") else 0
    assert info.moe_layers == tuple(range(first, 4))
    assert info.num_experts == 16
    assert info.top_k == (2 if arch == "mixtral" else 4)
    assert info.eos_token_ids == (2, 4)


def test_a_fused_layout(model_dir: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.experts.gate_up_proj": [5, 4, 8] for i in range(2)}
    (model_dir / "model.safetensors").write_bytes(safetensors(shapes))
    info = inspect_checkpoint(model_dir)
    assert (info.num_experts, info.moe_layers) == (5, (0, 1))


def test_layers_behind_the_decoder_do_not_count(model_dir: Path) -> None:
    """Multi-token prediction: published behind the last decoder layer, never loaded."""
    (model_dir / "model.safetensors").write_bytes(safetensors(per_expert(3, 3)))
    assert inspect_checkpoint(model_dir).moe_layers == (0, 1)


def test_no_directory(tmp_path: Path) -> None:
    assert "is not a directory: give a local checkpoint" in refusal(tmp_path / "nothing")
    file = tmp_path / "file"
    file.write_text("x")
    assert "is not a directory" in refusal(file)


def test_no_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    assert "no config.json" in refusal(model_dir)


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "[1]", '"x"', "{'a': 1}"])
def test_garbage_in_the_config(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text)
    assert "config.json" in refusal(model_dir)


def test_bytes_that_are_no_text(model_dir: Path) -> None:
    (model_dir / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(model_dir)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_without_dimensions(model_dir: Path, key: str) -> None:
    edit(model_dir, **{key: None})
    assert f"has no {key}" in refusal(model_dir)
    edit(model_dir, **{key: "many"})
    assert f"has no {key}" in refusal(model_dir)


def test_a_config_without_top_k(model_dir: Path) -> None:
    edit(model_dir, num_experts_per_tok=None)
    assert "how many experts a token uses" in refusal(model_dir)


@pytest.mark.parametrize("value", ["many", [64], True])
def test_a_config_with_a_wrong_length(model_dir: Path, value: Any) -> None:
    edit(model_dir, max_position_embeddings=value)
    assert "max_position_embeddings" in refusal(model_dir)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", [{"quant_method": "fp8"}, {"bits": 4}, "fp8"])
def test_a_quantised_one(model_dir: Path, key: str, value: Any) -> None:
    edit(model_dir, **{key: value})
    message = refusal(model_dir)
    assert "is quantised" in message
    assert "use a bfloat16 or float32 one" in message


def test_a_dense_model(model_dir: Path) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": [8, 4]}
    (model_dir / "model.safetensors").write_bytes(safetensors(shapes))
    message = refusal(model_dir)
    assert "SomeMoeForCausalLM" in message
    assert "no routed experts" in message


def test_layers_that_differ(model_dir: Path) -> None:
    shapes = {**per_expert(2, 3), **per_expert(1, 4)}
    (model_dir / "model.safetensors").write_bytes(safetensors(shapes))
    assert "different numbers of experts" in refusal(model_dir)


def test_no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "no .safetensors files" in refusal(model_dir)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_file_cut_short(model_dir: Path, kept: int) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(model_dir)
    assert str(path) in message
    assert "cannot be read" in message


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"shape": [1]}}', b"\xff\xff"]
)
def test_garbage_in_a_header(model_dir: Path, header: bytes) -> None:
    raw = struct.pack("<Q", len(header)) + header
    (model_dir / "model.safetensors").write_bytes(raw)
    assert "cannot be read" in refusal(model_dir)


def test_a_missing_shard(model_dir: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002.safetensors is missing: the checkpoint is incomplete" in refusal(model_dir)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_garbage_in_the_index(model_dir: Path, text: str) -> None:
    (model_dir / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(model_dir)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (None, None, ()),
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, {"eos_token_id": [1, 2]}, (1, 2)),
        (7, {}, (7,)),
        (7, {"eos_token_id": None}, (7,)),
        ([7, 7], None, (7,)),
        (None, {"eos_token_id": [-1, 2, 31, 32, 2]}, (2, 31)),
        (-1, None, ()),
        (10**30, {}, ()),
    ],
)
def test_tokens_that_end(
    model_dir: Path, eos: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    edit(model_dir, eos_token_id=eos)
    if generation is not None:
        (model_dir / "generation_config.json").write_text(json.dumps(generation))
    assert inspect_checkpoint(model_dir).eos_token_ids == expected


@pytest.mark.parametrize("ids", [-1, 32, [2, 10**6]])
def test_ids_that_no_token_has_are_named_in_the_log(
    model_dir: Path, ids: Any, caplog: pytest.LogCaptureFixture
) -> None:
    edit(model_dir, eos_token_id=ids)
    inspect_checkpoint(model_dir)
    (line,) = caplog.messages
    assert "config.json: eos_token_id [" in line
    assert "(0 to 31)" in line


@pytest.mark.parametrize("ids", ["two", True, [True], 2.5, [2, None], [[2]], {"a": 1}, [2.0]])
def test_what_is_no_token_id_is_refused(model_dir: Path, ids: Any) -> None:
    edit(model_dir, eos_token_id=ids)
    assert "config.json: eos_token_id must be" in refusal(model_dir)
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert "generation_config.json: eos_token_id must be" in refusal(model_dir)


def test_the_end_is_the_named_folders(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for folder, ids in ((model_dir, 3), (other, [4, 5])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    sources = ("auto", "vllm", str(other))
    found = [inspect_checkpoint(model_dir, source).eos_token_ids for source in sources]
    assert found == [(3,), (3,), (4, 5)]
    (other / "generation_config.json").write_text("{}")
    assert inspect_checkpoint(model_dir, str(other)).eos_token_ids == (2,)
    with pytest.raises(ValueError, match="--generation-config /nowhere"):
        inspect_checkpoint(model_dir, "/nowhere")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_a_file_that_nests_too_deep(model_dir: Path, name: str) -> None:
    (model_dir / name).write_text("[" * 10**5)
    assert name in refusal(model_dir)


@pytest.mark.parametrize("text", ["", "[]", '{"eos_token_id": "two"}'])
def test_garbage_in_the_generation_config(model_dir: Path, text: str) -> None:
    (model_dir / "generation_config.json").write_text(text)
    assert "generation_config.json" in refusal(model_dir)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")],
)
def test_the_dtype(model_dir: Path, given: str, expected: str) -> None:
    edit(model_dir, dtype=None, torch_dtype=given)
    assert inspect_checkpoint(model_dir).dtype == expected
