import json
import struct
from pathlib import Path
from typing import Any

import pytest

from revivemoe.checkpoint import ARCHS, files
from revivemoe.checkpoint.inspect import inspect_checkpoint

CONFIG = {
    "architectures": ["SomeMoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_experts": 3,
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
    edit(model_dir, num_experts=5)
    shapes = {f"model.layers.{i}.mlp.experts.gate_up_proj": [5, 4, 8] for i in range(2)}
    (model_dir / "model.safetensors").write_bytes(safetensors(shapes))
    info = inspect_checkpoint(model_dir)
    assert (info.num_experts, info.moe_layers) == (5, (0, 1))


def test_layers_behind_the_decoder_do_not_count(model_dir: Path) -> None:
    """Multi-token prediction: published behind the last decoder layer, never loaded."""
    (model_dir / "model.safetensors").write_bytes(safetensors(per_expert(3, 3)))
    assert inspect_checkpoint(model_dir).moe_layers == (0, 1)


def extended(model_dir: Path, **shapes: list[int]) -> None:
    """With tensors of these names (`__` for a dot) besides."""
    others = {name.replace("__", "."): shape for name, shape in shapes.items()}
    held = {"model.embed_tokens.weight": [32, 4], **per_expert(2, 3), **others}
    (model_dir / "model.safetensors").write_bytes(safetensors(held))


def test_prediction_beside_the_decoder_does_not_count(model_dir: Path) -> None:
    plain = inspect_checkpoint(model_dir)
    extended(
        model_dir, mtp__layers__0__mlp__experts__4__up_proj__weight=[2, 4], mtp__fc__weight=[9],
        model__mtp__layers__1__mlp__experts__0__up_proj__weight=[9, 9],
        model__mtp_block__0__mlp__gate_proj__weight=[5],
    )  # fmt: skip
    assert inspect_checkpoint(model_dir) == plain


def test_experts_of_two_decoders(model_dir: Path) -> None:
    extended(model_dir, draft__layers__0__mlp__experts__0__up_proj__weight=[2, 4])
    assert "belong to more than one decoder (draft., model.)" in refusal(model_dir)


@pytest.mark.parametrize("number", [4, 999999999])
def test_experts_with_gaps(model_dir: Path, number: int) -> None:
    extended(model_dir, **{f"model.layers.0.mlp.experts.{number}.up_proj.weight": [2, 4]})
    assert f"has 4 experts, numbered up to {number}: the checkpoint is inc" in refusal(model_dir)


def test_fewer_experts_than_the_configuration_says(model_dir: Path) -> None:
    edit(model_dir, num_experts=8)
    assert "holds 3 experts in each layer, and its config.json says 8" in refusal(model_dir)


@pytest.mark.parametrize(
    ("top_k", "why"), [(0, "num_experts_per_tok 0 is less than 1"), (4, "uses 4 experts, and a")]
)
def test_a_token_uses_some_of_the_experts(model_dir: Path, top_k: int, why: str) -> None:
    edit(model_dir, num_experts_per_tok=top_k)
    assert why in refusal(model_dir)


def test_a_dense_part_beside_experts_is_no_dense_layer(model_dir: Path) -> None:
    """Gemma's: it would be shared, in another order than that in which the model comes to it."""
    edit(model_dir, num_hidden_layers=4)
    widths = {0: 8, 2: 12, 3: 18}
    dense = {f"model.layers.{n}.mlp.gate_proj.weight": [w, 4] for n, w in widths.items()}
    extended(model_dir, **dense)
    info = inspect_checkpoint(model_dir)
    assert (info.dense_layers, info.dense_width) == ((2, 3), 6)


def test_a_dense_part_that_is_no_matrix(model_dir: Path) -> None:
    extended(model_dir, model__layers__0__mlp__gate_proj__weight=[])
    assert "gate_proj.weight has shape [], which is no matrix" in refusal(model_dir)


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
@pytest.mark.parametrize("value", ["many", 0, -1, [3]])
def test_dimensions_that_cannot_be(model_dir: Path, key: str, value: Any) -> None:
    edit(model_dir, **{key: value})
    message = refusal(model_dir)
    assert "config.json" in message
    assert key in message or "layer" in message


@pytest.mark.parametrize("value", [5, {"a": 1}, [5]])
def test_architectures_that_are_no_names(model_dir: Path, value: Any) -> None:
    edit(model_dir, architectures=value)
    assert "config.json: architectures" in refusal(model_dir)


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unknown", nested(900)),
        ("per_layer_config", {"0": {"hidden_size": 8}}),
        ("per_layer_config", 5),
    ],
)
def test_what_transformers_stumbles_over(model_dir: Path, key: str, value: Any) -> None:
    edit(model_dir, **{key: value})
    assert "config.json: " in refusal(model_dir)


def test_weights_that_the_configuration_names_itself(model_dir: Path) -> None:
    edit(model_dir, transformers_weights="other.safetensors")
    assert "names weights of its own (transformers_weights)" in refusal(model_dir)


def test_what_the_config_does_not_say_is_the_familys(model_dir: Path) -> None:
    from transformers import Qwen3MoeConfig

    (model_dir / "model.safetensors").write_bytes(safetensors(per_expert(2, 8)))
    edit(
        model_dir, vocab_size=None, num_experts_per_tok=None, max_position_embeddings=None,
        num_experts=8,
    )  # fmt: skip
    info, default = inspect_checkpoint(model_dir), Qwen3MoeConfig()
    assert info.vocab_size == default.vocab_size
    assert info.top_k == default.num_experts_per_tok
    assert info.max_positions == default.max_position_embeddings


@pytest.mark.parametrize("model_type", [None, "", "nobody_knows"])
def test_a_family_nobody_knows(model_dir: Path, model_type: str | None) -> None:
    edit(model_dir, model_type=model_type)
    assert "model_type" in refusal(model_dir) or "nobody_knows" in refusal(model_dir)


def test_code_of_the_checkpoints_own_is_not_run(model_dir: Path) -> None:
    edit(model_dir, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (model_dir / "own.py").write_text("raise SystemExit('run')\n")
    assert "config.json" in refusal(model_dir)


def test_names_that_the_family_translates(model_dir: Path) -> None:
    """`attribute_map`: the name in the file is the family's, the one we ask for is common."""
    edit(
        model_dir, model_type="longcat_flash", num_layers=2, moe_topk=3, num_hidden_layers=None,
        num_experts_per_tok=None, n_routed_experts=3, zero_expert_num=0,
    )  # fmt: skip
    info = inspect_checkpoint(model_dir)
    assert (info.moe_layers, info.top_k) == ((0, 1), 3)


def test_experts_that_are_none(model_dir: Path) -> None:
    """It was called incomplete, by a count that has them among the others."""
    edit(
        model_dir, model_type="longcat_flash", num_layers=2, moe_topk=3, num_hidden_layers=None,
        num_experts_per_tok=None, n_routed_experts=3, zero_expert_num=2,
    )  # fmt: skip
    assert "(longcat_flash) has 2 zero experts in each layer" in refusal(model_dir)


def test_layers_that_keep_another_state(model_dir: Path) -> None:
    edit(model_dir, model_type="qwen3_next", layer_types=["linear_attention", "full_attention"])
    assert "has layers of linear_attention: only attention over" in refusal(model_dir)


@pytest.mark.parametrize(
    ("rope", "most", "why"),
    [
        ({"rope_type": "default"}, 128, ""),
        ({"rope_type": "linear", "factor": 4.0}, 128, ""),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, ""),
        ({"rope_type": "yarn", "factor": 4.0}, 512, ""),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 16}, 128, ""),
        ({"rope_type": "dynamic", "factor": 4.0}, 128, "dynamic"),
        (
            {
                "rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0],
                "original_max_position_embeddings": 32, "factor": 4.0,
            },
            32,
            "longrope",
        ),
        (
            {
                "rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0],
                "original_max_position_embeddings": 32.0, "factor": 4.0,
            },
            32,
            "longrope",
        ),
        (
            {
                "rope_type": "linear", "short_mscale": 1.1, "long_mscale": 1.2,
                "original_max_position_embeddings": 32, "factor": 4.0,
            },
            32,
            "linear",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_how_long_a_text_may_become(
    model_dir: Path, field: str, rope: dict[str, Any], most: int, why: str
) -> None:
    edit(model_dir, head_dim=2, **{field: rope | {"rope_theta": 1e4}})
    info = inspect_checkpoint(model_dir)
    assert info.max_positions == most
    assert why in info.positions_end
    assert bool(why) == bool(info.positions_end)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, -1, "x"])
def test_rope_scaling_by_what_is_no_number(model_dir: Path, key: str, value: Any) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, key: value}
    edit(model_dir, head_dim=2, rope_parameters=rope)
    assert "config.json: " in refusal(model_dir)


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


def header(shape: Any, dtype: Any, name: str = "a") -> bytes:
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(4)


SHAPES: tuple[Any, ...] = (
    ["x"], [None], {"b": 1}, [-5], [1.5], [True], 5, [10**400], [1 << 63], [1 << 32] * 2, [1] * 65,
    [0, 1 << 63],
)  # fmt: skip


@pytest.mark.parametrize(
    "file",
    [
        *(header(shape, "F32") for shape in SHAPES),
        header([1], 5),
        header([1], "F32", f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight"),
        header([1], "F32", "model.layers.0.mlp.experts.\u00b2.up_proj.weight"),
    ],
)
def test_a_header_that_says_what_cannot_be(model_dir: Path, file: bytes) -> None:
    (model_dir / "model.safetensors").write_bytes(file)
    message = refusal(model_dir)
    assert "model.safetensors cannot be read" in message
    assert "damaged?" in message


A, B = "model.layers.0.mlp.experts.0.up_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "offsets",
    [
        {A: [0, 4], B: [4, 12]},
        {A: [0, 16], B: [16, 24]},
        {A: [0, 8], B: [4, 12]},
        {A: [0, 8], B: [0, 8]},
        {A: [0, 8], B: [12, 20]},
        {A: [8, 0], B: [0, 8]},
        {A: [-8, 0], B: [0, 8]},
        {A: [0.0, 8.5], B: [8, 16]},
        {A: [0, 8], B: [8, 10**400]},
        {A: "ab", B: [0, 8]},
        {A: [0, 8, 9], B: [8, 16]},
        {A: [8], B: [8, 16]},
        {A: [0, 8]},
    ],
)
def test_tensors_that_lie_where_they_cannot(model_dir: Path, offsets: dict[str, Any]) -> None:
    """Their bytes were other tensors', or nobody's, which came out where they were loaded."""
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in offsets.items()}
    raw = json.dumps(entries).encode()
    file = struct.pack("<Q", len(raw)) + raw + bytes(64)
    (model_dir / "model.safetensors").write_bytes(file)
    message = refusal(model_dir)
    assert "model.safetensors cannot be read" in message
    assert len(message) < 400


@pytest.mark.parametrize("dtype", ["I8", "U8"])
@pytest.mark.parametrize("name", ["gate_up_proj", "0.up_proj.qweight"])
def test_experts_that_are_stored_as_integers(model_dir: Path, name: str, dtype: str) -> None:
    """Where they are fused, their names do not end as those of other weights do."""
    name = f"model.layers.0.mlp.experts.{name}"
    entries = {name: {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    raw = json.dumps(entries).encode()
    file = struct.pack("<Q", len(raw)) + raw + bytes(4)
    (model_dir / "model.safetensors").write_bytes(file)
    assert f"{name} is stored as {dtype}: weights are read where" in refusal(model_dir)


def test_a_header_as_long_as_none_may_be(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_HEADER_BYTES", 100)
    assert "longer than the file, or than any may be" in refusal(model_dir)


def test_a_missing_shard(model_dir: Path) -> None:
    index = {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    shard(model_dir, json.dumps({"weight_map": index}))
    assert "model-00002.safetensors is missing: the checkpoint is incomplete" in refusal(model_dir)


def shard(model_dir: Path, index: str) -> None:
    """The one file becomes a shard beside this index."""
    (model_dir / "model.safetensors").rename(model_dir / "model-00001.safetensors")
    (model_dir / "model.safetensors.index.json").write_text(index)


GARBAGE = ("", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}')


@pytest.mark.parametrize("text", [*GARBAGE, '{"weight_map": {"a": "../x.safetensors"}}'])
def test_garbage_in_the_index(model_dir: Path, text: str) -> None:
    shard(model_dir, text)
    assert "model.safetensors.index.json" in refusal(model_dir)


def test_the_single_file_goes_before_an_index(model_dir: Path) -> None:
    """As in `transformers`: an index beside it may be left over from before a merge."""
    (model_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    assert inspect_checkpoint(model_dir).moe_layers == (0, 1)


@pytest.mark.parametrize("empty", [b"", safetensors({})], ids=["no bytes", "no tensors"])
def test_a_shard_that_is_named_and_empty(model_dir: Path, empty: bytes) -> None:
    held = "model.layers.0.mlp.experts.0.up_proj.weight"
    index = {held: "model-00001.safetensors", "b": "model-00002.safetensors"}
    shard(model_dir, json.dumps({"weight_map": index}))
    (model_dir / "model-00002.safetensors").write_bytes(empty)
    message = refusal(model_dir)
    assert "model-00002.safetensors" in message
    assert "empty" in message or "lacks b, which" in message


def test_tensors_that_the_index_forgets_are_there(model_dir: Path) -> None:
    """As in `transformers`: it reads whole shards."""
    held = "model.layers.0.mlp.experts.0.up_proj.weight"
    shard(model_dir, json.dumps({"weight_map": {held: "model-00001.safetensors"}}))
    assert inspect_checkpoint(model_dir).num_experts == 3


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


def test_the_end_of_the_whole_or_else_of_its_decoder(model_dir: Path) -> None:
    """Where a model has other parts too."""
    inner = {"vocab_size": 32, "num_hidden_layers": 2, "num_experts": 3, "top_k_experts": 2}
    for outer, expected in ((7, (7,)), (None, (9,))):
        edit(
            model_dir, model_type="gemma4", eos_token_id=outer,
            text_config=inner | {"model_type": "gemma4_text", "eos_token_id": 9},
        )  # fmt: skip
        config = json.loads((model_dir / "config.json").read_text()) | {"eos_token_id": outer}
        (model_dir / "config.json").write_text(json.dumps(config))
        assert inspect_checkpoint(model_dir).eos_token_ids == expected
    del config["eos_token_id"]
    (model_dir / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(model_dir).eos_token_ids == (9,)


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
    message = refusal(model_dir)
    assert "config.json" in message
    assert "eos_token_id" in message
    edit(model_dir)
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
    if "index" in name:
        shard(model_dir, "")
    (model_dir / name).write_text("[" * 10**5)
    assert name in refusal(model_dir)


@pytest.mark.parametrize("text", ["", "[]", '{"eos_token_id": "two"}'])
def test_garbage_in_the_generation_config(model_dir: Path, text: str) -> None:
    (model_dir / "generation_config.json").write_text(text)
    assert "generation_config.json" in refusal(model_dir)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float64", "bfloat16"),
    ],
)
def test_the_dtype(model_dir: Path, given: str, expected: str) -> None:
    edit(model_dir, dtype=None, torch_dtype=given)
    assert inspect_checkpoint(model_dir).dtype == expected
