"""Our arithmetic against float64, and that no row's bits depend on what is computed beside it."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from revivemoe.kernels.native import Head, Seen
from revivemoe.model.router import softmax_then_top_k

DTYPES = [torch.float32, torch.bfloat16]
ROWS, CHOICES, SLOTS, HIDDEN, INNER = 37, 4, 8, 128, 96


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """To a rounding of `dtype`, and what float32 sums lose."""
    error = (got.double() - expected).abs() / (expected.abs() + 1)
    assert error.max() < (2**-8 if dtype == torch.bfloat16 else 2e-5)


# ---- linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inner"), [(1, 7, 64), (5, 130, 128), (70, 129, 512), (6, 9, 60)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(native, dtype, rows, outputs, inner, with_bias):
    x, weight = drawn(rows, inner, dtype=dtype), drawn(outputs, inner, dtype=dtype, seed=1)
    bias = drawn(outputs, dtype=dtype, seed=2) if with_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    got = native.linear(x, weight, bias)
    assert_near(got, expected, dtype)
    for row in range(rows):
        assert torch.equal(native.linear(x[row : row + 1], weight, bias), got[row : row + 1])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(native.linear(x, weight, bias), got)
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_odd_layouts(native, dtype):
    weight = drawn(9, 64, dtype=dtype)
    wide = drawn(6, 128, dtype=dtype)
    plain = native.linear(wide[:, :64].contiguous(), weight, None)
    assert torch.equal(native.linear(wide[:, :64], weight, None), plain)
    turned = wide[:, :64].T.contiguous().T
    assert torch.equal(native.linear(turned, weight, None), plain)
    assert native.linear(wide[None, :, :64], weight, None).shape == (1, 6, 9)
    assert native.linear(wide[:0, :64], weight, None).shape == (0, 9)


def test_what_fits(native):
    assert native.fits(drawn(9, 60))
    assert native.fits_experts(drawn(2, 9, 64))
    assert not native.fits_experts(drawn(2, 9, 60))
    assert not native.fits(drawn(9, 64).half())
    assert not native.fits(drawn(9, 64).double())
    assert not native.fits(drawn(64, 64).T)


def test_nan_stays_in_its_row(native):
    x, weight = drawn(6, 64), drawn(9, 64)
    whole = native.linear(x, weight, None)
    x[3, 5] = torch.nan
    got = native.linear(x, weight, None)
    assert got[3].isnan().all()
    assert torch.equal(got[[0, 1, 2, 4, 5]], whole[[0, 1, 2, 4, 5]])


# ---- routers ---------------------------------------------------------------------------------


def router(dtype: torch.dtype, experts: int, top_k: int, normalise: bool) -> SimpleNamespace:
    weight = drawn(experts, 64, dtype=dtype, seed=7)
    return SimpleNamespace(weight=weight, top_k=top_k, norm_topk_prob=normalise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k", "healthy"), [(32, 4, 32), (7, 3, 2), (130, 8, 100)])
def test_choices_are_those_of_the_torch_form(native, dtype, normalise, experts, top_k, healthy):
    """But which one of two equals comes first."""
    like, x = router(dtype, experts, top_k, normalise), drawn(50, 64, dtype=dtype)
    missing = torch.arange(experts) >= healthy
    _, weights, ids = softmax_then_top_k(like, x, missing)
    got = native.route(x, like.weight, top_k, normalise, dtype, missing)
    tolerance = {"rtol": 0.02, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got[1], weights, **tolerance)
    equal = (got[2] == ids)[weights > 0]
    assert equal.double().mean() > 0.9
    shown = torch.where(missing, -torch.inf, got[0].float())
    picked, expected = shown.gather(1, got[2]), shown.gather(1, ids)
    torch.testing.assert_close(picked, expected, rtol=0.02, atol=1e-5)
    assert all(len(set(row)) == top_k for row in got[2].tolist())


def test_of_equals_the_first_is_chosen(native):
    _, weights, ids = native.route(drawn(3, 64), torch.ones(6, 64), 4, True, torch.float32)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[0.25] * 4] * 3


def test_with_no_expert_left_nothing_weighs(native):
    missing = torch.ones(6, dtype=torch.bool)
    _, weights, ids = native.route(drawn(3, 64), drawn(6, 64), 4, True, torch.float32, missing)
    assert not weights.any()
    assert ids.min() >= 0
    assert ids.max() < 6


def test_nan_stays_nan_in_its_weights(native):
    x = drawn(3, 64)
    x[1, 5] = torch.nan
    _, weights, ids = native.route(x, drawn(6, 64), 4, True, torch.float32)
    assert weights.isnan().all(1).tolist() == [False, True, False]
    assert ids[1].tolist() == [0, 1, 2, 3]


# ---- queries, keys and values ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (24, 40), (16, 16)])
def test_heads_are_turned_and_written(native, dtype, with_bias, with_norm, dim, dim_v):
    """As `transformers` does it, operator by operator, and rounded after each."""
    heads, kv_heads, inner, rows = 6, 2, 96, 7
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim_v)
    weights = [drawn(n, inner, dtype=dtype, seed=i) for i, n in enumerate(sizes)]
    biases = [drawn(n, dtype=dtype, seed=9 + i) if with_bias else None for i, n in enumerate(sizes)]
    norms = [drawn(dim, dtype=dtype, seed=20 + i) if with_norm else None for i in range(2)]
    x, half = drawn(rows, inner, dtype=dtype, seed=5), drawn(rows, dim // 2, seed=6)
    angles = torch.cat([half, half], 1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pages = drawn(5, 4, kv_heads, dim, dtype=dtype), drawn(5, 4, kv_heads, dim_v, dtype=dtype)
    before = [of.clone() for of in pages]
    slots = torch.tensor([3, 19, 0, 7, 8, 9, 12])
    parts = [Head(weights[i], biases[i], norms[i], 1e-6) for i in range(2)]
    query = native.project(x, *parts, (weights[2], biases[2]), (cos, sin), slots, pages)

    def products(i: int) -> Tensor:
        flat = native.linear(x, weights[i], biases[i]).view(rows, -1, (dim, dim, dim_v)[i])
        return flat if i == 2 or not with_norm else native.rms_norm(flat, norms[i], 1e-6)

    def turned(of: Tensor) -> Tensor:
        swapped = torch.cat([-of[..., dim // 2 :], of[..., : dim // 2]], -1)
        return of * cos[:, None] + swapped * sin[:, None]

    for of, i in ((pages[0], 1), (pages[1], 2)):
        flat, was = of.view(20, *of.shape[2:]), before[i - 1].view(20, *of.shape[2:])
        assert torch.equal(flat[slots], turned(products(i)) if i == 1 else products(i))
        others = [slot for slot in range(20) if slot not in slots.tolist()]
        assert torch.equal(flat[others], was[others])
    assert torch.equal(query, turned(products(0)))
    again = [of.clone() for of in before]
    alone = native.project(
        x[2:3], *parts, (weights[2], biases[2]), (cos[2:3], sin[2:3]), slots[2:3], tuple(again)
    )
    assert torch.equal(alone, query[2:3])


# ---- experts --------------------------------------------------------------------------------


def expert_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SLOTS + 3, (ROWS, CHOICES), generator=generator).clamp(max=SLOTS)
    weights = torch.rand(ROWS, CHOICES, generator=generator)
    gate_up = (drawn(SLOTS, 2 * INNER, HIDDEN, seed=4) / 11).to(dtype)
    down = (drawn(SLOTS, HIDDEN, INNER, seed=5) / 10).to(dtype)
    return drawn(ROWS, HIDDEN, dtype=dtype), ids, weights, gate_up, down


def naive_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, choice in (ids < SLOTS).nonzero().tolist():
        slot = ids[row, choice]
        gate, up = (gate_up[slot].double() @ x[row].double()).chunk(2)
        inner = (silu(gate) * up).to(x.dtype).double()
        out[row] += weights[row, choice].double() * (down[slot].double() @ inner)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_experts(native, dtype, exact):
    x, ids, weights, *params = case = expert_case(dtype)
    got = native.experts(*case, exact=exact)
    assert got.dtype == (torch.float64 if exact else torch.float32)
    error_R = (got.double() - naive_experts(*case)).abs().amax(1)
    # In some rows a value between the products lies so that it is rounded the other way.
    assert error_R.max() < (1e-2 if dtype == torch.bfloat16 else 2e-5)
    assert (error_R < 2e-5).double().mean() > 0.7
    assert (got[(ids == SLOTS).all(1)] == 0).all()
    for rows in (slice(0, 1), slice(5, 9), slice(11, ROWS)):
        alone = native.experts(x[rows], ids[rows], weights[rows], *params, exact=exact)
        assert torch.equal(alone, got[rows])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    turned = native.experts(x[order], ids[order], weights[order], *params, exact=exact)
    assert torch.equal(turned, got[order])
    torch.set_num_threads(2)
    assert torch.equal(native.experts(*case, exact=exact), got)
    torch.set_num_threads(1)


def test_many_rows_are_computed_in_portions(native, monkeypatch):
    case = expert_case(torch.float32)
    whole = native.experts(*case)
    monkeypatch.setattr("revivemoe.kernels.native.SCRATCH", 1)
    monkeypatch.setattr("revivemoe.kernels.native.LEAST_ROWS", 5)
    assert torch.equal(native.experts(*case), whole)


def test_rows_of_another_dtype_than_the_experts_are_refused(native):
    x, *rest = expert_case(torch.float32)
    with pytest.raises(RuntimeError, match="bfloat16"):
        native.experts(x.bfloat16(), *rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_sum_does_not_depend_on_where_experts_are(native, dtype):
    """In any order of choices, and in parts that are added up in any order."""
    x, ids, weights, gate_up, down = expert_case(dtype)
    whole = native.experts(x, ids, weights, gate_up, down, exact=True)
    order = [2, 0, 3, 1]
    assert torch.equal(
        native.experts(x, ids[:, order], weights[:, order], gate_up, down, exact=True), whole
    )
    parts = []
    for slots in ([0, 5, 7], [1, 2], [3, 4, 6]):
        of_slot = torch.full((SLOTS + 1,), len(slots))
        of_slot[slots] = torch.arange(len(slots))
        part = native.experts(x, of_slot[ids], weights, gate_up[slots], down[slots], exact=True)
        parts.append(part)
    assert torch.equal(parts[2] + parts[0] + parts[1], whole)
    assert torch.equal(parts[0] + parts[1] + parts[2], whole)


def test_no_rows_and_no_slots(native):
    x, ids, weights, gate_up, down = expert_case(torch.float32)
    assert native.experts(x[:0], ids[:0], weights[:0], gate_up, down).shape == (0, HIDDEN)
    assert (native.experts(x, ids * 0, weights, gate_up[:0], down[:0]) == 0).all()


def test_large_numbers_are_as_torch_has_them(native):
    """The silu of what is very negative is 0, of what is very large the same."""
    gate_up, down = torch.zeros(1, 64, 32), torch.zeros(1, 32, 32)
    gate_up[0, :32].fill_diagonal_(1)
    gate_up[0, 32:].fill_diagonal_(1)
    down[0].fill_diagonal_(1)
    x = torch.tensor([[-1e4, -100, -88, 0, 1e-30, 88, 1e4] + [1.0] * 25])
    got = native.experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), gate_up, down)
    expected = silu(x.double()) * x.double()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-30)


# ---- norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [50, 64, 512])
def test_rms_norm(native, dtype, size):
    x, weight = drawn(3, 5, size, dtype=dtype), drawn(size, dtype=dtype, seed=1)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    got = native.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-7)
    assert torch.equal(native.rms_norm(x[1:2, 3:4], weight, 1e-6), got[1:2, 3:4])


# ---- attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dim_v"), [(10, 2, 64, 64), (4, 4, 16, 24), (3, 1, 40, 8)]
)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention(native, dtype, heads, kv_heads, dim, dim_v, window, with_sinks):
    blocks, block_size, lengths = 20, 16, [1, 5, 16, 17, 70, 96]
    keys = drawn(blocks, block_size, kv_heads, dim, dtype=dtype, seed=1)
    values = drawn(blocks, block_size, kv_heads, dim_v, dtype=dtype, seed=2)
    query = drawn(len(lengths) + 1, heads, dim, dtype=dtype)
    sinks = drawn(heads, seed=3) if with_sinks else None
    generator = torch.Generator().manual_seed(4)
    tables = torch.stack([torch.randperm(blocks, generator=generator)[:6] for _ in lengths])
    seen = Seen(torch.arange(1, 1 + len(lengths)), tables, torch.tensor(lengths))
    out = torch.full((len(query), heads, dim_v), 7.0, dtype=dtype)
    native.attend(query, keys, values, seen, out, dim**-0.5, window, sinks)
    assert (out[0] == 7).all(), "a row that does not attend is left alone"
    for row, length in enumerate(lengths):
        first = max(0, length - window) if window else 0
        key, value = (pages[tables[row]].flatten(0, 1)[first:length] for pages in (keys, values))
        for head in range(heads):
            of_kv = head // (heads // kv_heads)
            scores = key[:, of_kv].double() @ query[row + 1, head].double() * dim**-0.5
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            expected = scores.softmax(0)[: len(key)] @ value[:, of_kv].double()
            assert_near(out[row + 1, head], expected, dtype)
    alone = torch.empty_like(out)
    one = Seen(seen.rows_B[4:5], tables[4:5].contiguous(), seen.lengths_B[4:5])
    native.attend(query, keys, values, one, alone, dim**-0.5, window, sinks)
    assert torch.equal(alone[5], out[5])
