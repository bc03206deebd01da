"""Which attention modules compute in one call of ours, and that the tokens stay those of torch."""

import random
from pathlib import Path

import pytest
import torch
from support.solo import SoloRank

from revivemoe.checkpoint.make import make_model
from revivemoe.core.limits import RankLimits
from revivemoe.kernels.native import Native
from revivemoe.model.fused_attention import FusedAttention
from revivemoe.sampling_params import SamplingParams

PARAMS = SamplingParams(seed=0, temperature=0.0, max_tokens=12, logprobs=2)
FUSED = {"qwen3_moe": True, "mixtral": True, "olmoe": False, "deepseek_v3": False}


def limits(tokens: int) -> RankLimits:
    return RankLimits(
        num_blocks=100, block_size=8, max_num_seqs=8, max_num_batched_tokens=tokens,
        max_model_len=256,
    )  # fmt: skip


def rank(directory: Path, tokens: int = 64) -> SoloRank:
    return SoloRank(directory, limits(tokens))


@pytest.fixture(scope="module", params=sorted(FUSED))
def model(request, tmp_path_factory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("models") / request.param
    make_model(directory, request.param, "tiny", 0, "float32")
    return request.param, directory


def test_those_that_are_made_so(model: tuple[str, Path], native: Native) -> None:
    arch, directory = model
    generator = rank(directory).runner.generator
    assert generator is not None
    forwards = [m.forward for m in generator._attention_modules()]
    assert {isinstance(forward, FusedAttention) for forward in forwards} == {FUSED[arch]}


def test_the_same_log_probabilities_as_their_own_code(
    model: tuple[str, Path], native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows and many, prompts in chunks: the module's own code takes what is many."""
    _, directory = model
    draw = random.Random(3)
    prompts = [[draw.randrange(16, 500) for _ in range(n)] for n in (3, 40, 90)]
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("revivemoe.model.generator.fuse_attention", lambda *_: 0)
        solo = rank(directory)
        solo.run([prompts[0]], PARAMS)
        solo.committed.clear()
        solo.run(prompts, PARAMS)
        found.append(sorted(solo.committed, key=lambda token: (token.seq_id, token.position)))
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-4)


def test_another_rotation_is_not_taken(
    tmp_path: Path, native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that are turned together, as some families do it: what comes out tells."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

    def neighbours(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def turned(x: torch.Tensor) -> torch.Tensor:
            swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos[:, None] + swapped * sin[:, None]

        return turned(q), turned(k)

    monkeypatch.setattr(theirs, "apply_rotary_pos_emb", neighbours)
    make_model(tmp_path / "m", "qwen3_moe", "tiny", 0, "float32")
    generator = rank(tmp_path / "m").runner.generator
    assert generator is not None
    forwards = [m.forward for m in generator._attention_modules()]
    assert not any(isinstance(forward, FusedAttention) for forward in forwards)
