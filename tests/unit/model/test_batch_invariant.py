"""With `alone` a request's log-probabilities are the same bits, whatever is computed beside it."""

import random
from pathlib import Path

import pytest
import torch
from support.reference import reference_tokens
from support.solo import SoloRank
from torch import nn
from transformers import AutoModelForCausalLM

from revivemoe.checkpoint.presets import ARCHS
from revivemoe.core.limits import RankLimits
from revivemoe.kernels.native import Native
from revivemoe.model.batch_invariant import BatchVariant, RowsAlone
from revivemoe.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("native")
PARAMS = SamplingParams(seed=0, temperature=0.0, max_tokens=12, logprobs=3)


def limits(tokens: int, seqs: int) -> RankLimits:
    return RankLimits(
        num_blocks=100, block_size=8, max_num_seqs=seqs, max_num_batched_tokens=tokens,
        max_model_len=256,
    )  # fmt: skip


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(5, 500) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


Said = dict[int, list[tuple[int, str]]]


def told(rank: SoloRank) -> Said:
    """By sequence, everything that was said of its tokens; forgets it."""
    said: Said = {}
    for token in rank.committed:
        said.setdefault(token.seq_id, []).append((token.token_id, repr(token.logprobs)))
    rank.committed.clear()
    return said


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*((arch, torch.bfloat16) for arch in ARCHS), ("deepseek_v3", torch.float32)],
)
def test_bits_do_not_depend_on_the_batch(
    arch: str, dtype: torch.dtype, made: dict[str, Path]
) -> None:
    """Alone; many at once, in prefills of other lengths; and through steps that are undone."""
    given = prompts(7)
    alone = SoloRank(made[arch], limits(64, 1), dtype=dtype, alone=True)
    expected: Said = {}
    for number, prompt in enumerate(given):
        alone.run([prompt], PARAMS)
        expected[number] = told(alone)[0]
    many = SoloRank(made[arch], limits(23, 7), dtype=dtype, alone=True)
    many.run(given, PARAMS)
    assert told(many) == expected
    other = SoloRank(made[arch], limits(40, 7), dtype=dtype, alone=True)
    other.run(given, PARAMS, steps_apart=2)
    assert told(other) == expected
    tokens = [[token for token, _ in expected[number]] for number in range(len(given))]
    assert other.run_interrupted(given, PARAMS, random.Random(1)) == tokens


def test_without_it_they_do(made: dict[str, Path]) -> None:
    """So that the test above can fail: by default, bits do depend on the batch."""
    first, second = (
        SoloRank(made["qwen3_moe"], limits(*of), dtype=torch.bfloat16) for of in ((64, 1), (23, 7))
    )
    for rank in (first, second):
        rank.run(prompts(7), PARAMS)
    assert told(first) != told(second)


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
def test_it_is_still_the_model(arch: str, made: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[arch], dtype=torch.float32).eval()
    rank = SoloRank(made[arch], limits(64, 4), alone=True)
    (prompt,) = prompts(1)
    (got,) = rank.run([prompt], PARAMS)
    expected = reference_tokens(model, prompt, PARAMS, 256)
    agree = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), 12)
    assert agree >= 6, "a near-tie may part them, but not at once"


def test_products_that_cannot_be_alone_are_refused() -> None:
    rows, weight = torch.randn(3, 64), torch.randn(9, 64)
    with RowsAlone(Native()):
        assert nn.functional.linear(rows, weight).shape == (3, 9)
        assert (rows[:, :1] @ weight[:1]).shape == (3, 64), "a single product needs no order"
        with pytest.raises(BatchVariant, match="matmul"):
            _ = rows @ weight.T
        with pytest.raises(BatchVariant, match="bmm"):
            torch.bmm(rows[None], weight.T[None])
        with pytest.raises(BatchVariant, match="addmm"):
            torch.addmm(torch.zeros(1), rows, weight.T)
        with pytest.raises(BatchVariant, match="scaled_dot_product"):
            nn.functional.scaled_dot_product_attention(rows[None], rows[None], rows[None])
        with pytest.raises(BatchVariant, match=r"shape \(9, 64\) in float64"):
            nn.functional.linear(rows.double(), weight.double())


@pytest.mark.parametrize("act", [nn.functional.silu, torch.sigmoid, torch.rsqrt, torch.Tensor.exp])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elementwise_functions_do_not_depend_on_where_an_element_lies(act, dtype) -> None:
    values = torch.rand(67, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    with RowsAlone(Native()):
        whole = act(values)
        assert whole.shape == values.shape
        for row in range(67):
            assert torch.equal(act(values[row : row + 1]), whole[row : row + 1])
            assert torch.equal(act(values[row:].T).T, whole[row:])
    torch.testing.assert_close(whole, act(values))


def test_nor_on_the_number_of_threads() -> None:
    """Torch shares out what is long, and computes the end of each share otherwise."""
    values = torch.randn(47, 1408, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(4)
    try:
        with RowsAlone(Native()):
            whole = nn.functional.silu(values)
            assert all(
                torch.equal(nn.functional.silu(values[i : i + 1]), whole[i : i + 1])
                for i in range(47)
            )
    finally:
        torch.set_num_threads(1)
