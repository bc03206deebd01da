"""Random checkpoints load, tokenise and look like published ones."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from revivemoe.checkpoint import ARCHS, make_model
from revivemoe.checkpoint.presets import END_IDS, SIZES, config_fields
from revivemoe.checkpoint.tokenizer import SPECIAL_TOKENS

ENDS = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
GROUPED_QUERY = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
QK_NORM = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
EXPERTS = ["mlp.gate.weight", *(f"mlp.experts.N.{p}_proj.weight" for p in ("gate", "up", "down"))]
DENSE = [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
SHARED = [f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")]
BIAS = "mlp.gate.e_score_correction_bias"
LATENT = ["q_a_proj", "q_a_layernorm", "q_b_proj"]
LATENT += ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
MIXTRAL = ["block_sparse_moe.gate.weight"]
MIXTRAL += [f"block_sparse_moe.experts.N.w{i}.weight" for i in (1, 2, 3)]

PUBLISHED_LAYER_KEYS = {
    "qwen3_moe": [*NORMS, *GROUPED_QUERY, *QK_NORM, *EXPERTS],
    "mixtral": [*NORMS, *GROUPED_QUERY, *MIXTRAL],
    "olmoe": [*NORMS, *GROUPED_QUERY, *QK_NORM, *EXPERTS],
    "deepseek_v3": [
        *NORMS,
        *(f"self_attn.{p}.weight" for p in LATENT),
        *EXPERTS,
        *DENSE,
        *SHARED,
        BIAS,
    ],
    "glm4_moe": [
        *NORMS,
        *GROUPED_QUERY,
        *(f"self_attn.{p}_proj.bias" for p in "qkv"),
        *QK_NORM,
        *EXPERTS,
        *DENSE,
        *SHARED,
        BIAS,
    ],
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def digests_of(directory: Path) -> dict[str, str]:
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


@pytest.mark.parametrize("arch", ARCHS)
def test_loads_and_is_tiny(made: dict[str, Path], arch: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[arch])
    config = AutoConfig.from_pretrained(made[arch])
    assert config.model_type == arch
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert config.num_hidden_layers == 4
    assert config.max_position_embeddings >= 4096
    assert model.dtype == torch.float32
    assert set(model.generation_config.eos_token_id) == set(END_IDS)
    assert len(list(made[arch].glob("*.safetensors"))) > 1


@pytest.mark.parametrize("arch", ARCHS)
def test_keys_are_those_of_published_checkpoints(made: dict[str, Path], arch: str) -> None:
    index = json.loads((made[arch] / "model.safetensors.index.json").read_text())
    written = tensors_of(made[arch])
    assert set(index["weight_map"]) == set(written)
    templates = {re.sub(r"\.\d+\.", ".N.", re.sub(r"\.\d+\.", ".N.", key)) for key in written}
    expected = {*ENDS, *(f"model.layers.N.{key}" for key in PUBLISHED_LAYER_KEYS[arch])}
    assert templates == expected


@pytest.mark.parametrize("arch", ARCHS)
def test_config_has_the_published_names(made: dict[str, Path], arch: str) -> None:
    written = json.loads((made[arch] / "config.json").read_text())
    assert written.items() >= config_fields(arch, SIZES["tiny"]).items()


def test_dense_layers_groups_and_bias_of_the_sigmoid_families(made: dict[str, Path]) -> None:
    for arch in ("deepseek_v3", "glm4_moe"):
        written = tensors_of(made[arch])
        assert "model.layers.0.mlp.up_proj.weight" in written
        assert "model.layers.0.mlp.gate.weight" not in written
        bias = written["model.layers.1.mlp.gate.e_score_correction_bias"]
        assert bias.min() >= 0
        assert len(set(bias.tolist())) > 1
    config = AutoConfig.from_pretrained(made["deepseek_v3"])
    assert 1 < config.topk_group < config.n_group


def test_equal_arguments_give_equal_files_and_other_seeds_other_weights(
    made: dict[str, Path], tmp_path: Path
) -> None:
    for seed in (0, 1):
        make_model(tmp_path / str(seed), "deepseek_v3", "tiny", seed=seed)
    assert digests_of(tmp_path / "0") == digests_of(made["deepseek_v3"])
    other, mine = tensors_of(tmp_path / "1"), tensors_of(tmp_path / "0")
    assert all(not torch.equal(other[key], mine[key]) for key in mine)


def test_bfloat16_is_the_rounded_float32_and_the_bias_stays(
    made: dict[str, Path], tmp_path: Path
) -> None:
    make_model(tmp_path / "m", "glm4_moe", "tiny", seed=0, dtype="bfloat16")
    exact = tensors_of(made["glm4_moe"])
    for key, tensor in tensors_of(tmp_path / "m").items():
        if key.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, exact[key])
        else:
            assert torch.equal(tensor, exact[key].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arch", "preset", "dtype", "message"),
    [
        ("gpt2", "tiny", "float32", "unknown architecture 'gpt2': choose one of qwen3_moe"),
        ("mixtral", "huge", "float32", "unknown preset 'huge': choose one of tiny"),
        ("mixtral", "tiny", "int8", "unknown dtype 'int8': choose one of float32"),
    ],
)
def test_unknown_names_are_refused(
    tmp_path: Path, arch: str, preset: str, dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tmp_path / "m", arch, preset, seed=0, dtype=dtype)
    assert not (tmp_path / "m").exists()


def test_a_directory_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="not an empty directory"):
        make_model(tmp_path, "mixtral", "tiny", seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_progress_names_what_begins(tmp_path: Path) -> None:
    lines: list[str] = []
    make_model(tmp_path / "m", "mixtral", "tiny", seed=0, progress=lines.append)
    assert [line.split()[0] for line in lines] == ["training", "drawing", "writing"]


# ---- tokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(made: dict[str, Path]) -> dict[str, Any]:
    return {arch: AutoTokenizer.from_pretrained(path) for arch, path in made.items()}


def test_vocabulary_fits_the_model_and_specials_have_their_ids(tokenizers: dict[str, Any]) -> None:
    for tokenizer in tokenizers.values():
        assert len(tokenizer) == SIZES["tiny"].vocab
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(5))
        assert tokenizer.eos_token_id in END_IDS


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives(tokenizers: dict[str, Any], text: str) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_english_takes_fewer_tokens_than_letters(tokenizers: dict[str, Any]) -> None:
    text = "The experts that were lost are loaded again by the other ranks."
    assert len(tokenizers["qwen3_moe"].encode(text)) < len(text) / 2


def test_chat_template(tokenizers: dict[str, Any]) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b> & ñ"}]
    for tokenizer in tokenizers.values():
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi <b> & ñ<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids.count(3) == 3


@pytest.mark.parametrize("preset", ["small", "medium"])
def test_bigger_vocabularies_are_filled(tmp_path: Path, preset: str) -> None:
    from revivemoe.checkpoint.tokenizer import save_tokenizer

    save_tokenizer(tmp_path, SIZES[preset].vocab)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == SIZES[preset].vocab


@pytest.mark.parametrize(("preset", "millions"), [("small", (90, 130)), ("medium", (800, 1200))])
@pytest.mark.parametrize("arch", ARCHS)
def test_bigger_presets_have_the_promised_size(
    arch: str, preset: str, millions: tuple[int, int]
) -> None:
    config = AutoConfig.for_model(arch, **config_fields(arch, SIZES[preset]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    low, high = millions
    assert low < sum(p.numel() for p in model.parameters()) / 1e6 < high
