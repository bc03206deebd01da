"""Every MoE architecture of the installed `transformers`: a tiny checkpoint of it, and whether we
serve it as `transformers` does.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from support.reference import reference_tokens
from support.solo import SoloRank
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from revivemoe.checkpoint.tokenizer import save_tokenizer
from revivemoe.checkpoint.weights import fill_weights
from revivemoe.core.limits import RankLimits
from revivemoe.sampling_params import SamplingParams

VOCABULARY = 512
GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=16)
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip
PROMPT_LENS = (5, 43)

EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
)  # fmt: skip
TINY: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
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
EXCEPTIONS: dict[str, dict[str, object]] = {}


@dataclass(frozen=True)
class Verdict:
    """Of one family. Neither `equal` nor a refusal: it is served wrongly, or not understood."""

    model_type: str
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
    text = whole.sub_configs.get("text_config", whole)
    if text is AutoConfig:  # whatever its checkpoint says: that type stands for itself
        text = whole
    names = {*dir(text), *text.__annotations__, *text.attribute_map}
    return not names.isdisjoint(EXPERT_COUNTS)


def tiny_config(model_type: str) -> PreTrainedConfig:
    whole = AutoConfig.for_model(model_type)
    text = whole.get_text_config(decoder=True)
    fields = {n: v for n, v in TINY.items() if getattr(text, n, None) is not None}
    fields |= EXCEPTIONS.get(text.model_type, {})
    if text is whole:
        return AutoConfig.for_model(model_type, **fields)
    return AutoConfig.for_model(model_type, text_config={**fields, "model_type": text.model_type})


def save_tiny(model_type: str, directory: Path) -> None:
    """A checkpoint as `save_pretrained` writes it, with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    fill_weights(model, 0)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    save_tokenizer(directory, VOCABULARY)


def judge(model_type: str, directory: Path) -> Verdict:
    save_tiny(model_type, directory)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    name = type(whole).__name__
    try:
        solo = SoloRank(directory, LIMITS)
    except (ValueError, NotImplementedError) as error:
        return Verdict(model_type, name, refusal=str(error).replace(f"{directory}", "DIR"))
    expected = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    got = solo.run(prompts(), GREEDY, steps_apart=2)
    if got != expected:
        return Verdict(model_type, name, wrong=f"{got} instead of {expected}")
    return Verdict(model_type, name, equal=True, maskable=solo.runner.maskable)


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(5, VOCABULARY, (n,), generator=draw).tolist() for n in PROMPT_LENS]
