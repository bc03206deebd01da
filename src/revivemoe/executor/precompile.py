"""Compile what the ranks of a deployment will need, before there is one."""

from collections.abc import Sequence
from pathlib import Path

import torch

from revivemoe.executor.compile_cache import compile_cache
from revivemoe.executor.spec import RankSpec
from revivemoe.model.runner import ModelRunner

BLOCKS = 1


def precompile(spec: RankSpec, folders: Sequence[Path]) -> str:
    """As the attention rank of this description does it when it starts; what came of it. There is
    nothing of experts, ranks or roles in graphs, so these are those of a collocated rank, of one
    that has lost peers, of one that comes back; an expert rank has none.

    Raises CheckpointError, NoKernels.
    """
    assert spec.attention, "an expert rank has no graphs"
    torch.set_num_threads(spec.threads)
    torch.set_grad_enabled(False)
    runner = ModelRunner(
        Path(spec.model_dir),
        dict.fromkeys(spec.slots, ()),
        spec.num_experts,
        spec.top_k,
        getattr(torch, spec.dtype),
        torch.device(spec.device),
        kernels=spec.kernels,
        in_graphs=True,
    )
    runner.allocate(BLOCKS, spec.limits.block_size)
    with compile_cache(folders) as said:
        return f"{runner.compile()}{said}"
