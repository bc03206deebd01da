"""What configuration, files and class say of a checkpoint may disagree: we load what `transformers`
loads of it, and generate the same, or refuse in one line.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import GREEDY, LIMITS, prompts
from support.reference import reference_tokens
from support.solo import SoloRank
from transformers import AutoModelForCausalLM

from revivemoe.model.load import CheckpointError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
State = dict[str, torch.Tensor]


@pytest.fixture
def path(made: dict[str, Path], tmp_path: Path) -> Path:
    """Of one file, to be spoiled."""
    directory = Path(shutil.copytree(made["qwen3_moe"], tmp_path / "model"))
    shards = sorted(directory.glob("*.safetensors*"))
    state = {n: t for f in shards if f.suffix != ".json" for n, t in load_file(f).items()}
    for shard in shards:
        shard.unlink()
    save(directory, state)
    return directory


def save(directory: Path, state: State) -> None:
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def change(directory: Path, how: Callable[[State], State]) -> None:
    save(directory, how(load_file(directory / "model.safetensors")))


def edit(directory: Path, **fields: Any) -> None:
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def same_tokens(directory: Path) -> list[list[int]]:
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    assert SoloRank(directory, LIMITS).run(prompts(), GREEDY) == expected
    return expected


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        SoloRank(directory, LIMITS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if n not in names}


# ---- tying ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_stays_so(path: Path, tied: bool) -> None:
    before = same_tokens(path)
    edit(path, tie_word_embeddings=tied)
    assert same_tokens(path) == before


@pytest.mark.parametrize("absent", [HEAD, EMBEDDINGS])
def test_one_of_two_that_are_tied(path: Path, absent: str) -> None:
    edit(path, tie_word_embeddings=True)
    change(path, without(absent))
    same_tokens(path)


def test_both_of_two_that_are_tied_and_equal(path: Path) -> None:
    edit(path, tie_word_embeddings=True)
    change(path, lambda state: {**state, HEAD: state[EMBEDDINGS].clone()})
    same_tokens(path)


def test_neither_of_two_that_are_tied(path: Path) -> None:
    edit(path, tie_word_embeddings=True)
    change(path, without(EMBEDDINGS, HEAD))
    assert "does not fill the model: " in refusal(path)


@pytest.mark.parametrize("absent", [HEAD, EMBEDDINGS])
def test_one_of_two_that_are_not_tied(path: Path, absent: str) -> None:
    """`transformers` would go on with random numbers, and a warning."""
    change(path, without(absent))
    assert absent in refusal(path)


def test_a_checkpoint_of_the_body_alone(path: Path) -> None:
    """Saved by the class without a head: its names lack the prefix."""
    edit(path, tie_word_embeddings=True)
    change(path, lambda s: {n.removeprefix("model."): t for n, t in without(HEAD)(s).items()})
    same_tokens(path)


# ---- flags ----------------------------------------------------------------------------------

LEFT_OVER = {
    "output_router_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "return_dict": False,
    "gradient_checkpointing": True,
    "attention_dropout": 0.5,
    "router_jitter_noise": 0.5,
    "router_aux_loss_coef": 3.0,
}


@pytest.mark.parametrize("flag", LEFT_OVER)
def test_what_training_left_over(path: Path, flag: str) -> None:
    plain = SoloRank(path, LIMITS).run(prompts(), GREEDY)
    edit(path, **{flag: LEFT_OVER[flag]})
    assert SoloRank(path, LIMITS).run(prompts(), GREEDY) == plain


def test_all_of_it_while_experts_are_masked(path: Path) -> None:
    """The first step after a recovery that masks is none of the originals' any more."""
    masked = {layer: {1, 5, 9} for layer in range(4)}
    plain = SoloRank(path, LIMITS, masked).run(prompts(), GREEDY)
    edit(path, **LEFT_OVER)
    assert SoloRank(path, LIMITS, masked).run(prompts(), GREEDY) == plain


# ---- types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(made: dict[str, Path], arch: str, dtype: torch.dtype) -> None:
    """Sums over experts are ours, in float32: the tokens agree until rounding tells them apart."""
    whole = AutoModelForCausalLM.from_pretrained(made[arch], dtype=dtype)
    solo = SoloRank(made[arch], LIMITS, dtype=dtype)
    assert {
        p.dtype for p in solo.runner.generator.model.model.layers[1].self_attn.parameters()
    } == {dtype}
    got = solo.run(prompts(), GREEDY)
    for prompt, tokens in zip(prompts(), got, strict=True):
        expected = reference_tokens(whole, prompt, GREEDY, LIMITS.max_model_len)
        assert tokens[:3] == expected[:3]
