"""Every MoE architecture of the installed `transformers`: a tiny checkpoint of it, and whether we
serve it as `transformers` does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.reference import reference_tokens
from support.solo import SoloRank
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from revivemoe.checkpoint.tokenizer import save_tokenizer
from revivemoe.checkpoint.weights import fill_weights
from revivemoe.core.limits import RankLimits
from revivemoe.ids import ExpertId, SlotId
from revivemoe.model.load import load_model
from revivemoe.sampling_params import SamplingParams

VOCABULARY, LAYERS = 512, 4
GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=16)
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip
PROMPT_LENS = (5, 43)
LOGITS_OFF = 1e-4
"""Arithmetic noise of another chunking is below 1e-5."""

EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
)  # fmt: skip
TINY: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(EXPERT_COUNTS, 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "num_nextn_predict_layers": 0,
}
"""Fields of tiny models, set where the default configuration has them and is not None."""
MAY_BE_NONE = ("q_lora_rank", "n_group", "topk_group")
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
EXCEPTIONS: dict[str, dict[str, object]] = {
    "gemma4_text": {
        "enable_moe_block": True, "hidden_size_per_layer_input": 8, "global_head_dim": 16,
        "vocab_size_per_layer_input": 512,
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2,
        },
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {**INDEXER, "indexer_budget": 32, "indexer_compress_ratio": 4},
    "phimoe": {"sliding_window": None},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Where a family's fields bind one another."""
BESIDE: dict[str, dict[str, object]] = {
    "dots3_note": {f"{part}_config": {"adapter_out_dim": 64} for part in ("vision", "audio")},
}
"""Of what is not the decoder of text."""
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
VARIANTS: dict[str, dict[str, object]] = {
    "qwen3_moe, yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE}},
    "qwen3_moe, linear rope scaling": {"rope_parameters": {"rope_type": "linear", **ROPE}},
    "qwen3_moe, dynamic NTK": {"rope_parameters": {"rope_type": "dynamic", **ROPE}},
    "qwen3_moe, longrope": {
        "rope_parameters": {
            "rope_type": "longrope", **ROPE, **LONG, "original_max_position_embeddings": 96,
        }
    },
    "qwen3_moe, some layers dense": {"mlp_only_layers": [0, 2]},
    "qwen3_moe, tied": {"tie_word_embeddings": True},
    "deepseek_v2, limited to groups": {
        "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
    },
    "deepseek_v3, queries of full rank": {"q_lora_rank": None},
    "phimoe, a window shorter than texts": {"sliding_window": 16},
    "minimax_m3_vl_text, sparse attention": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2
    },
    "gemma4_text, layers that share keys and values": {"num_kv_shared_layers": 2},
    "granitemoehybrid, attention alone": dict.fromkeys(
        ("layer_types", "layers_block_type"), ["full_attention"] * LAYERS
    ),
}  # fmt: skip
"""What a family can be too: its name, a comma, and how it differs."""


@dataclass(frozen=True)
class Verdict:
    """Of one family. Neither `equal` nor a refusal: it is served wrongly."""

    name: str
    class_name: str
    equal: bool = False
    maskable: bool = False
    refusal: str = ""
    wrong: str = ""


def moe_types() -> list[str]:
    """`model_type` of every causal language model whose configuration counts experts."""
    return sorted(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _counts_experts(t))


def _counts_experts(model_type: str) -> bool:
    whole = CONFIG_MAPPING[model_type]
    parts = [whole.sub_configs.get(name, whole) for name in ("text_config", "ffn_config")]
    # Where any text model may stand below a type, that one stands for itself.
    classes = {whole if part is AutoConfig else part for part in parts}
    names = {n for c in classes for n in (*dir(c), *c.__annotations__, *c.attribute_map)}
    return not names.isdisjoint(EXPERT_COUNTS)


def tiny_config(name: str) -> PreTrainedConfig:
    """`name`: a model type, or one of `VARIANTS`."""
    model_type = name.partition(",")[0]
    whole = AutoConfig.for_model(model_type)
    text = whole.get_text_config(decoder=True)
    fields = {n: v for n, v in TINY.items() if _has(text, n)}
    if _has(text, "kv_lora_rank"):  # latents: the heads' sizes are its own
        fields |= {"num_key_value_heads": fields["num_attention_heads"]}
        fields.pop("head_dim", None)
    fields |= _layer_kinds(text) | EXCEPTIONS.get(text.model_type, {}) | VARIANTS.get(name, {})
    if text is whole:
        return AutoConfig.for_model(model_type, **fields)
    fields |= {"model_type": text.model_type}
    return AutoConfig.for_model(model_type, text_config=fields, **BESIDE.get(model_type, {}))


def _has(config: PreTrainedConfig, name: str) -> bool:
    """Whether the configuration has this field; in some it may differ from layer to layer."""
    try:
        value = getattr(config, name)
    except AttributeError:
        return False
    except RuntimeError:
        return True
    return value is not None or name not in MAY_BE_NONE


def _layer_kinds(config: PreTrainedConfig) -> dict[str, object]:
    """Every kind of layer that the default has, in as many layers as there are here."""
    kinds: dict[str, object] = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        own = not isinstance(getattr(type(config), name, None), property)
        if own and (given := getattr(config, name, None)):
            distinct = list(dict.fromkeys(given))
            kinds[name] = (distinct * LAYERS)[:LAYERS]
    return kinds


def save_tiny(name: str, directory: Path) -> None:
    """A checkpoint as `save_pretrained` writes it, with a tokenizer."""
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    fill_weights(model, 0)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    save_tokenizer(directory, VOCABULARY)


def judge(name: str, directory: Path) -> Verdict:
    """Make it, load it as a rank does, and compare the greedy tokens of two prompts, in float32.

    Raises whatever comes that is neither a right answer nor a refusal in one line.
    """
    save_tiny(name, directory)
    class_name = str(AutoConfig.from_pretrained(directory).architectures[0])
    try:
        solo = SoloRank(directory, LIMITS)
    except ValueError as error:
        said = str(error).replace(str(directory), "DIR")
        assert "\n" not in said
        return Verdict(name, class_name, refusal=said)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    got = solo.run(prompts(), GREEDY, steps_apart=2)
    if got != expected:
        return Verdict(name, class_name, wrong=f"{got} instead of {expected}")
    for prompt, tokens in zip(prompts(), expected, strict=True):
        off = _logits_off(solo, whole, prompt, tokens)
        if off > LOGITS_OFF:
            return Verdict(name, class_name, wrong=f"the tokens are right, logits off by {off:.1e}")
    _check_experts_alone(solo, directory)
    return Verdict(name, class_name, equal=True, maskable=solo.runner.maskable)


def _check_experts_alone(solo: SoloRank, directory: Path) -> None:
    """What an expert rank loads, and what a recovery reads, is what lies in the slots of a rank
    that has all of them.
    """
    layers = solo.runner.exchange.layers
    slots = dict.fromkeys(layers, (6, -1, 1))
    loaded = load_model(directory, slots, torch.float32, torch.device("cpu"), attention=False)
    for number, layer in layers.items():
        rows = solo.runner.worker._reader.read(number, [ExpertId(6), ExpertId(1)])
        for at, expert in enumerate((6, 1)):
            for name, held in layer.read_slot(SlotId(expert)).items():
                assert torch.equal(rows[name][at], held), f"layer {number}: {name} read alone"
                part = getattr(loaded.experts[number], name)[2 * at]
                assert torch.equal(part, held), f"layer {number}: {name} of an expert rank"


@torch.inference_mode()
def _logits_off(solo: SoloRank, whole: Any, prompt: list[int], tokens: list[int]) -> float:
    """Largest difference of any logit while `tokens` are drawn, in parts of the largest logit: a
    text that runs in a circle would not show much else.
    """
    drawn: list[torch.Tensor] = []
    generator = solo.runner.generator
    original = generator.draw
    generator.draw = lambda items, scores, logits: (
        drawn.append(logits), original(items, scores, logits)
    )[1]  # fmt: skip
    try:
        solo.run([prompt], GREEDY)
    finally:
        del generator.draw
    ours = torch.cat(drawn)
    theirs = whole(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(5, VOCABULARY, (n,), generator=draw).tolist() for n in PROMPT_LENS]
