"""Logits of long prompts are made a slice at a time, and are the same as all at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.solo import SoloRank
from unit.model.test_expert_rank import enter

from revivemoe.checkpoint import ARCHS
from revivemoe.core.limits import RankLimits
from revivemoe.core.step import Batch, StepResult
from revivemoe.model import head
from revivemoe.model.finite import NonFiniteStep
from revivemoe.model.head import KeptRow, in_slices
from revivemoe.sampling_params import SamplingParams

LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=80,
    max_model_len=96, prefill_tokens_beside_decodes=40,
)  # fmt: skip
SCORED = SamplingParams(seed=3, temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=2)
PROMPTS = [list(range(20, 85)), list(range(5, 62)), [7, 8, 9]]
FEW = 32
"""Rows at once: two slices for a step that is full."""


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=60),
    st.integers(1, 20),
)
def test_every_row_is_in_one_slice(targets: list[int | None], most: int) -> None:
    kept = [KeptRow(0, i, target) for i, target in enumerate(targets)]
    slices = in_slices(kept, most)
    assert sorted(i for each in slices for i in each) == list(range(len(kept)))
    scored = [target is not None for target in targets]
    if len(kept) <= most or not any(scored):
        assert len(slices) == 1, "as they are"
        return
    of_prompts = slices if all(scored) else slices[1:]
    assert all(scored[i] for each in of_prompts for i in each)
    sizes = [len(each) for each in of_prompts]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1, "none is much smaller: rows could be rounded otherwise"


class Watched:
    """A rank, with the results of its steps and the rows given to its head in each call."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, microbatches: int = 1) -> None:
        self.solo = SoloRank(path, LIMITS)
        enter(self.solo.runner, microbatches)
        assert self.solo.runner.generator is not None
        self.head = self.solo.runner.generator._head
        self.results: list[StepResult] = []
        self.calls: list[int] = []
        output = self.solo.runner.generator.model.get_output_embeddings()
        output.register_forward_pre_hook(self._note)
        execute = self.solo.runner.execute

        def keep(batch: Batch) -> list[StepResult]:
            self.results += (found := execute(batch))
            return found

        monkeypatch.setattr(self.solo.runner, "execute", keep)

    def _note(self, module: Any, inputs: tuple[torch.Tensor]) -> None:
        self.calls.append(inputs[0].shape[:-1].numel())

    def run(self, params: SamplingParams = SCORED) -> list[list[int]]:
        return self.solo.run(PROMPTS, params, steps_apart=1)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("arch", ARCHS)
def test_slices_give_what_all_at_once_give(
    made: dict[str, Path], arch: str, microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Watched(made[arch], monkeypatch, microbatches)
    sliced = Watched(made[arch], monkeypatch, microbatches)
    sliced.head.most = FEW
    assert whole.run() == sliced.run()
    assert max(whole.calls) > FEW
    assert max(sliced.calls) <= FEW
    assert sum(sliced.calls) == sum(whole.calls), "each row once"
    assert len(whole.results) == len(sliced.results)
    for a, b in zip(whole.results, sliced.results, strict=True):
        assert a.prompt_logprobs == b.prompt_logprobs, "to the last bit"
        assert a.token_id == b.token_id


def test_without_prompt_logprobs_nothing_is_cut(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for a step, however many draw from it."""
    rank = Watched(made["qwen3_moe"], monkeypatch)
    rank.head.most = 1
    rank.run(SamplingParams(seed=3, temperature=0.0, max_tokens=3))
    assert max(rank.calls) > 1


def test_a_slice_takes_64_mib(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Watched(made["qwen3_moe"], monkeypatch)
    vocabulary = rank.solo.runner.generator.model.config.vocab_size
    assert rank.head.most * vocabulary * 4 <= 64 << 20
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * 40 * vocabulary)
    assert Watched(made["qwen3_moe"], monkeypatch).head.most == 40


@pytest.mark.parametrize("of", [0, 1, 2])
def test_broken_numbers_in_any_slice_are_seen(
    made: dict[str, Path], of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Watched(made["qwen3_moe"], monkeypatch)
    rank.head.most, seen = FEW, list[int]()

    def spoil(stage: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        if stage != "sample":
            return values
        seen.append(len(values))
        return torch.full_like(values, torch.nan) if len(seen) == of + 1 else values

    rank.solo.runner.exchange.spoil = spoil
    with pytest.raises(NonFiniteStep):
        rank.run()
    assert not rank.results, "nothing is drawn"
