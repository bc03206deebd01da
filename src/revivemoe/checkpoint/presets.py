"""Model shapes by architecture and preset. Values only; no torch."""

from dataclasses import dataclass

ARCHS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe")
PRESETS = ("tiny", "small", "medium")

PAD_ID, BOS_ID, EOS_ID, TURN_START_ID, TURN_END_ID = range(5)
"""Ids of the special tokens: the first in every vocabulary."""
END_IDS = (EOS_ID, TURN_END_ID)
"""Tokens that end a generation: end of text, and end of a chat turn."""


@dataclass(frozen=True)
class Preset:
    """The sizes that all architectures of one preset share."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_width: int
    dense_width: int
    dense_layers: int
    groups: int
    groups_per_token: int
    shard_bytes: int


SIZES = {
    # below 1 M parameters
    "tiny": Preset(
        vocab=512,
        hidden=64,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        experts=16,
        experts_per_token=4,
        expert_width=32,
        dense_width=128,
        dense_layers=1,
        groups=4,
        groups_per_token=2,
        shard_bytes=600_000,
    ),
    # about 110 M
    "small": Preset(
        vocab=4096,
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=64,
        experts=32,
        experts_per_token=4,
        expert_width=256,
        dense_width=1024,
        dense_layers=1,
        groups=8,
        groups_per_token=4,
        shard_bytes=100_000_000,
    ),
    # about 1 G
    "medium": Preset(
        vocab=8192,
        hidden=1024,
        layers=12,
        heads=16,
        kv_heads=4,
        head_dim=64,
        experts=64,
        experts_per_token=8,
        expert_width=384,
        dense_width=3072,
        dense_layers=2,
        groups=8,
        groups_per_token=4,
        shard_bytes=1_000_000_000,
    ),
}


def config_fields(arch: str, size: Preset) -> dict[str, object]:
    """Keyword arguments of the architecture's transformers config.

    The names are those of the published `config.json` files, which every release accepts.
    """
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    common: dict[str, object] = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "num_experts_per_tok": size.experts_per_token,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": list(END_IDS),
    }
    sigmoid_family: dict[str, object] = {
        "intermediate_size": size.dense_width,
        "moe_intermediate_size": size.expert_width,
        "n_routed_experts": size.experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": size.dense_layers,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    }
    match arch:
        case "qwen3_moe":
            return common | {
                "head_dim": size.head_dim,
                "intermediate_size": size.dense_width,
                "moe_intermediate_size": size.expert_width,
                "num_experts": size.experts,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        case "mixtral":
            return common | {
                "head_dim": size.head_dim,
                "intermediate_size": size.expert_width,
                "num_local_experts": size.experts,
                "num_experts_per_tok": 2,
            }
        case "olmoe":
            return common | {
                "intermediate_size": size.expert_width,
                "num_experts": size.experts,
                "norm_topk_prob": False,
            }
        case "deepseek_v3":
            return common | {
                **sigmoid_family,
                "num_key_value_heads": size.heads,
                "q_lora_rank": 3 * size.hidden // 4,
                "kv_lora_rank": size.hidden // 2,
                "qk_nope_head_dim": size.head_dim,
                "qk_rope_head_dim": size.head_dim // 2,
                "v_head_dim": size.head_dim,
                "n_group": size.groups,
                "topk_group": size.groups_per_token,
                "routed_scaling_factor": 2.5,
            }
        case "glm4_moe":
            return common | {
                **sigmoid_family,
                "head_dim": size.head_dim,
                "use_qk_norm": True,
                "attention_bias": True,
                "rope_parameters": rope | {"partial_rotary_factor": 0.5},
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
            }
    raise AssertionError(f"unknown architecture {arch!r}")
