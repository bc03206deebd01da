"""What ranks, shared memory and host cache of an instance are started with."""

from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.config import EngineConfig
from revivemoe.core.limits import RankLimits
from revivemoe.executor.spec import HostCacheSpec, InstanceSize, RankSpec, SegmentSpec
from revivemoe.ids import Incarnation, LayerId, RankId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Table

RESOLVED = "a configuration that is not resolved"


def rank_spec(
    config: EngineConfig,
    info: CheckpointInfo,
    home: Membership,
    rank: RankId,
    incarnation: Incarnation,
    slots: Table,
) -> RankSpec:
    """`home`: what the instance was started with: processes come back to their roles."""
    assert config.max_model_len is not None, RESOLVED
    assert config.max_num_seqs is not None, RESOLVED
    assert config.max_num_batched_tokens is not None, RESOLVED
    table = slots or ((),) * len(info.moe_layers)
    return RankSpec(
        rank=rank,
        incarnation=incarnation,
        model_dir=str(info.model_dir),
        attention=rank in home.attention,
        dense_layers=tuple(map(LayerId, info.dense_layers)) if home.dense is not None else (),
        dense_ffn_tp=config.dense_ffn_tp,
        dense_shards=tuple(sorted(home.shards_of(rank))),
        slots={LayerId(k): v for k, v in zip(info.moe_layers, table, strict=True)},
        num_experts=info.num_experts,
        top_k=info.top_k,
        dtype=config.dtype,
        device=config.rank_device(rank),
        threads=config.threads_per_rank,
        limits=RankLimits(
            num_blocks=0,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            prefill_tokens_beside_decodes=config.prefill_tokens_beside_decodes,
        ),
        kernels=config.kernels,
        batch_invariant=config.batch_invariant,
        in_graphs=config.in_graphs,
        compile_cache=tuple(map(str, config.compile_folders)),
        num_kv_blocks=config.num_kv_blocks,
        longest_sequences=config.longest_sequences,
        kv_memory_share=0.5 / _caches_beside(config, home, rank),
        instance=_size(config, info, home),
        commands="",
        reports="",
    )


def _caches_beside(config: EngineConfig, home: Membership, rank: RankId) -> int:
    """How many KV caches there are in the memory of this rank's device."""
    device = config.rank_device(rank)
    return max(1, sum(config.rank_device(other) == device for other in home.attention))


def _size(config: EngineConfig, info: CheckpointInfo, home: Membership) -> InstanceSize:
    slots = sum(len(row) for table in home.placement.slots.values() for row in table)
    cached = len(info.moe_layers) * info.num_experts if config.expert_host_cache else 0
    return InstanceSize(config.num_ranks, config.data_parallel_size, slots + cached)


def segment_spec(config: EngineConfig, info: CheckpointInfo) -> SegmentSpec:
    assert config.max_num_batched_tokens is not None, RESOLVED
    return SegmentSpec(
        num_ranks=config.num_ranks,
        channels=config.num_microbatches or 1,
        max_tokens=config.max_num_batched_tokens,
        hidden=info.hidden_size,
        itemsize=4 if config.dtype == "float32" else 2,
        top_k=max(info.top_k, config.dense_ffn_tp),
    )


def host_cache_spec(config: EngineConfig, info: CheckpointInfo) -> HostCacheSpec:
    """Converted experts that the ranks of a host share."""
    layers = tuple(LayerId(layer) for layer in info.moe_layers)
    return HostCacheSpec(str(info.model_dir), layers, info.num_experts, config.dtype)
