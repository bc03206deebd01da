"""How many blocks a rank's KV cache gets.

On CPU all ranks of an instance take from the same memory, and size their caches at about the same
moment: what is free then is also what the others are about to load. What the whole instance will
take is therefore reckoned first; a killed process would be the price, at some later step.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from revivemoe.executor.spec import ENGINE_BYTES, GRAPH_BYTES, RANK_BYTES, RankSpec
from revivemoe.host.memory import Limit, capacity, free_bytes
from revivemoe.model.host_cache import expert_bytes
from revivemoe.model.runner import ModelRunner

MIB = 1 << 20


class OutOfMemoryForKV(ValueError):
    """The KV cache cannot hold even one sequence of the longest length."""


def num_kv_blocks(spec: RankSpec, runner: ModelRunner) -> int:
    """None without the attention role.

    Raises OutOfMemoryForKV if one longest sequence does not fit.
    """
    if not spec.attention:
        return 0
    limits = spec.limits
    per_sequence = limits.blocks_for(limits.max_model_len)
    per_block = runner.kv_bytes_per_block(limits.block_size)
    space = room(spec, runner)
    free, why = space.free, space.why
    if spec.num_kv_blocks is not None:
        num_blocks = spec.num_kv_blocks
        _check(num_blocks * per_block, spec, space)
    else:
        affordable = int(free * spec.kv_memory_share) // per_block
        num_blocks = min(affordable, per_sequence * spec.longest_sequences)
    if num_blocks < per_sequence:
        raise OutOfMemoryForKV(
            f"KV cache of rank {spec.rank}: {num_blocks} blocks of {limits.block_size} tokens "
            f"({num_blocks * per_block / MIB:.0f} MiB) cannot hold one sequence of "
            f"--max-model-len {limits.max_model_len} tokens ({per_sequence} blocks, "
            f"{per_sequence * per_block / MIB:.0f} MiB); {free / MIB:.0f} MiB are free for the "
            f"caches of all ranks{why}: lower --max-model-len, raise --num-kv-blocks, or give the "
            "machine more memory"
        )
    return num_blocks


class Room(NamedTuple):
    """Bytes for the caches of all ranks that share a memory."""

    free: int
    """Now: ranks that came earlier have taken theirs."""
    whole: int | None
    """With nobody's taken yet; None where that is not known."""
    why: str
    """What bounds them, for people."""


def room(spec: RankSpec, runner: ModelRunner) -> Room:
    if spec.device.startswith("cuda"):
        return Room(int(torch.cuda.mem_get_info(torch.device(spec.device))[0]), None, "")
    limit = capacity()
    whole = left_of(limit, spec, runner)
    why = f" ({limit.path} is {limit.total // MIB} MiB)"
    return Room(min(free_bytes(), whole), whole, why)


def _check(wanted: int, spec: RankSpec, space: Room) -> None:
    """`--num-kv-blocks` must fit, in every rank. Raises OutOfMemoryForKV."""
    ranks = spec.instance.attention_ranks
    asked = f"KV cache of rank {spec.rank}: --num-kv-blocks {spec.num_kv_blocks} takes "
    if wanted > space.free:
        raise OutOfMemoryForKV(
            f"{asked}{wanted / MIB:.0f} MiB, and {space.free / MIB:.0f} MiB are free{space.why}: "
            "lower --num-kv-blocks"
        )
    if space.whole is not None and wanted * ranks > space.whole:
        raise OutOfMemoryForKV(
            f"{asked}{wanted / MIB:.0f} MiB in each of {ranks} ranks, and for all of them there "
            f"are {space.whole / MIB:.0f} MiB{space.why}: lower --num-kv-blocks"
        )


def left_of(limit: Limit, spec: RankSpec, runner: ModelRunner) -> int:
    """Once the instance has loaded all it is to load."""
    instance = spec.instance
    attention = runner.generator.num_bytes() if runner.generator is not None else 0
    experts = expert_bytes(Path(spec.model_dir), getattr(torch, spec.dtype))
    taken = (
        ENGINE_BYTES
        + instance.num_ranks * RANK_BYTES
        + instance.attention_ranks * (GRAPH_BYTES if spec.in_graphs else 0)
        + instance.attention_ranks * attention
        + instance.expert_slots * experts
    )
    return max(0, limit.total - taken)
