"""Families that `make-model` does not make, tiny, against `transformers`; all that it has are
walked by `make test-models`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import GREEDY, LIMITS, VARIANTS, judge, moe_types, prompts, save_tiny
from support.models_page import PAGE
from support.reference import reference_tokens
from support.solo import SoloRank
from transformers import AutoModelForCausalLM

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.model import paged
from revivemoe.model.router import MaskableRouter

SERVED = (
    "afmoe", "deepseek_v2", "dots1", "ernie4_5_moe", "flex_olmo", "gemma4_text", "glm4_moe_lite",
    "gpt_oss", "granitemoe", "hunyuan_v1_moe", "mellum", "mimo_v2_flash", "minimax_m2", "phimoe",
    "qwen2_moe", "qwen3_moe, yarn", "qwen3_moe, longrope", "deepseek_v2, limited to groups",
)  # fmt: skip
REFUSED = {
    "minimax": "layers of linear_attention",
    "qwen3_next": "layers of linear_attention",
    "llama4_text": "layers of chunked_attention",
    "deepseek_v32": "layers of indexed_attention",
    "jetmoe": "no experts module",
    "doge": "no routed experts",
    "dbrx": "config.json (dbrx) names no routed experts",
    "phimoe, a window shorter than texts": "does not tell its attention of its sliding window",
    "gemma4_text, layers that share keys and values": "do not keep keys and values of their own",
}


@pytest.mark.parametrize("name", SERVED)
def test_it_is_served_as_transformers_does(name: str, tmp_path: Path) -> None:
    verdict = judge(name, tmp_path / "model")
    assert verdict.equal, verdict


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    verdict = judge(name, tmp_path / "model")
    assert REFUSED[name] in verdict.refusal, verdict


def rows() -> dict[str, bool]:
    """Every row of the page: name, and whether it is served."""
    served, refused = PAGE.read_text().split("## Refused")
    names = [re.findall(r"^\| ([a-z][^|]*) \| \w+ \|", part, re.M) for part in (served, refused)]
    return dict.fromkeys(names[0], True) | dict.fromkeys(names[1], False)


def test_the_page_names_every_family() -> None:
    """It is written by `make test-models`: to be run again for another `transformers`."""
    assert rows().keys() == {*moe_types(), *VARIANTS}
    assert all(rows()[name] for name in SERVED)
    assert not any(rows()[name] for name in REFUSED)


MISSING = {0, 3, 6}


@pytest.mark.parametrize("name", ["granitemoe", "ernie4_5_moe", "minimax_m2", "hy_v3", "gpt_oss"])
def test_missing_experts_are_left_out(name: str, tmp_path: Path) -> None:
    """As in `transformers` with the same routers, each of which is tested for itself."""
    save_tiny(name, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layers = inspect_checkpoint(tmp_path).moe_layers
    plain = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    for block in [m for m in whole.modules() if hasattr(m, "experts")]:
        found = next(n for n in ("gate", "router") if hasattr(block, n))
        router = MaskableRouter(getattr(block, found))
        router.set_missing(torch.tensor([e in MISSING for e in range(8)]))
        setattr(block, found, router)
    expected = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    solo = SoloRank(tmp_path, LIMITS, dict.fromkeys(layers, MISSING))
    assert solo.run(prompts(), GREEDY, steps_apart=2) == expected
    assert expected != plain


# ---- the walk would notice ------------------------------------------------------------------


def changed(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> None:
    original = paged.paged_attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, **replaced})

    monkeypatch.setattr("revivemoe.model.runner.paged_attention", attention)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("gpt_oss", {"s_aux": None}),
        ("mellum", {"sliding_window": 17}),
        ("granitemoe", {"scaling": 0.25 * 1.01}),
    ],
)
def test_an_attention_that_loses_something_is_noticed(
    name: str, lost: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, **lost)
    assert judge(name, tmp_path / "model").wrong


@pytest.mark.parametrize("told", [{"softcap": 5.0}, {"bias": 1}, {"is_causal": False}])
def test_an_attention_that_is_told_more_than_we_know_is_refused(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, **told)
    save_tiny("qwen2_moe", tmp_path / "model")
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM is not supported: attention with"):
        SoloRank(tmp_path / "model", LIMITS)


def beside_the_longest(path: Path) -> tuple[list[int], list[int]]:
    """What a short text becomes alone, and beside one that grows to the longest that is served."""
    short, long = prompts()
    long = (long * 2)[: LIMITS.max_model_len - GREEDY.max_tokens]
    (alone,) = SoloRank(path, LIMITS).run([short], GREEDY)
    _, beside = SoloRank(path, LIMITS).run([long, short], GREEDY, steps_apart=12)
    return alone, beside


@pytest.mark.parametrize("switch_at", [LIMITS.max_model_len, 64])
@pytest.mark.parametrize("kind", ["dynamic NTK", "longrope", "yarn"])
def test_one_request_does_not_change_anothers_numbers(
    kind: str, switch_at: int, tmp_path: Path
) -> None:
    """Scaled rotary angles that follow the longest text: up to the length at which they switch,
    which is the longest that is served. Beyond it they would; yarn's follow none.
    """
    save_tiny(f"qwen3_moe, {kind}", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = switch_at
    if kind == "dynamic NTK":
        del config["rope_parameters"]["original_max_position_embeddings"]
        config["max_position_embeddings"] = switch_at
    (tmp_path / "config.json").write_text(json.dumps(config))
    alone, beside = beside_the_longest(tmp_path)
    assert (beside == alone) == (kind == "yarn" or switch_at == LIMITS.max_model_len)
    if kind != "yarn":
        assert inspect_checkpoint(tmp_path).max_positions == switch_at
