"""Attention over pages equals attention over whole sequences, whatever the tables look like."""

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revivemoe.core.sequence import Sequence
from revivemoe.core.step import ScheduledSequence
from revivemoe.ids import BlockId, SeqId
from revivemoe.messages.tokens import SequenceSpec
from revivemoe.model.batch_invariant import BatchVariant
from revivemoe.model.paged import PagedCache, paged_attention, plan_attention
from revivemoe.model.probe import ProbeCache
from revivemoe.sampling_params import SamplingParams

CPU = torch.device("cpu")


class Attention:
    """What `paged_attention` asks of an attention module."""

    def __init__(self, cache: Any) -> None:
        self.layer_idx = 0
        self.revive_cache = cache


class LatentAttention(Attention):
    """One latent per token; keys and values are made of it after the read."""

    def __init__(self, cache: Any, heads: int, latent: int, dim: int) -> None:
        super().__init__(cache)
        self.up_key = torch.randn(heads, latent, dim)
        self.up_value = torch.randn(heads, latent, dim)

    def expand_kv(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, L, latent], [B, 1, L, R] -> [B, H, L, dim + R], [B, H, L, dim]."""
        key, value = latent @ self.up_key, latent @ self.up_value
        return torch.cat([key, rotary.expand(-1, key.shape[1], -1, -1)], -1), value


@dataclass
class Case:
    """Sequences that hold some tokens already and run a few more in this step."""

    block_size: int
    kv_heads: int
    groups: int
    dim: int
    window: int | None
    held: list[int]
    new: list[int]
    seed: int
    sinks: bool = False

    @property
    def lengths(self) -> list[int]:
        return [h + n for h, n in zip(self.held, self.new, strict=True)]


def tables_of(case: Case) -> tuple[list[tuple[BlockId, ...]], int]:
    """Blocks dealt out in no order, with some that nobody has."""
    needed = [-(-length // case.block_size) for length in case.lengths]
    free = [BlockId(b) for b in range(sum(needed) + 5)]
    random.Random(case.seed).shuffle(free)
    return [tuple(free.pop() for _ in range(count)) for count in needed], sum(needed) + 5


def scheduled(number: int, start: int, count: int, table: tuple[BlockId, ...]) -> ScheduledSequence:
    spec = SequenceSpec(SeqId(number), [0] * (start + count), [], SamplingParams(seed=0), 0)
    return ScheduledSequence(Sequence.from_spec(spec), start, count, table, True)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition: [Hq, C, D] queries at positions start.. over [Hk, L, D]; [Hq, C, Dv]."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    for row in range(query.shape[1]):
        at = start + row
        for column in range(key.shape[1]):
            if column > at or (window is not None and column <= at - window):
                scores[:, row, column] = -math.inf
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[1]] @ value


def filled(cache: PagedCache, tables: list[Any], keys: list[Tensor], values: list[Tensor]) -> None:
    """Write whole sequences [L, H, D] position by position, and noise wherever nobody reads."""
    for pages in cache.pages[0]:
        pages.copy_(torch.randn(pages.shape) * 100)
    for table, key, value in zip(tables, keys, values, strict=True):
        for position in range(len(key)):
            block, offset = table[position // cache.block_size], position % cache.block_size
            cache.pages[0][0][block, offset] = key[position]
            cache.pages[0][1][block, offset] = value[position]


def items_of(case: Case, tables: list[tuple[BlockId, ...]]) -> list[ScheduledSequence]:
    return [
        scheduled(i, held, new, table)
        for i, (held, new, table) in enumerate(zip(case.held, case.new, tables, strict=True))
    ]


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    tables, num_blocks = tables_of(case)
    shape = (case.kv_heads, case.dim)
    cache = PagedCache([(shape, shape)], num_blocks, case.block_size, torch.float32, CPU)
    keys = [torch.randn(length, *shape) for length in case.lengths]
    values = [torch.randn(length, *shape) for length in case.lengths]
    # Only what was held before the step: the step itself writes the rest.
    old = [k[:h] for k, h in zip(keys, case.held, strict=True)]
    filled(cache, tables, old, [v[:h] for v, h in zip(values, case.held, strict=True)])
    cache.batch = plan_attention(items_of(case, tables), case.block_size, CPU)
    queries = [torch.randn(case.kv_heads * case.groups, n, case.dim) for n in case.new]

    def row_of(parts: list[Tensor]) -> Tensor:
        new = [p[h:] for p, h in zip(parts, case.held, strict=True)]
        return torch.cat(new).transpose(0, 1)[None]

    key, value = cache.update(row_of(keys), row_of(values), 0)
    sinks = torch.randn(case.kv_heads * case.groups) if case.sinks else None
    query = torch.cat(queries, 1)[None]
    out, weights = paged_attention(
        Attention(cache), query, key, value, None, sliding_window=case.window, s_aux=sinks
    )
    assert weights is None
    expected = torch.cat(
        [
            dense(q, k.transpose(0, 1), v.transpose(0, 1), h, case.window, sinks).transpose(0, 1)
            for q, k, v, h in zip(queries, keys, values, case.held, strict=True)
        ]
    )
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-4)


CASES = st.builds(
    Case,
    block_size=st.sampled_from([1, 2, 4, 16]),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    dim=st.sampled_from([4, 8]),
    window=st.sampled_from([None, None, 1, 3, 100]),
    held=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    new=st.just([]),
    seed=st.integers(0, 10**6),
    sinks=st.booleans(),
).flatmap(
    lambda case: st.lists(
        st.sampled_from([1, 1, 2, 7]), min_size=len(case.held), max_size=len(case.held)
    ).map(lambda new: Case(**{**case.__dict__, "new": new}))
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_pages_equal_whole_sequences(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sinks", [False, True])
def test_decodes_and_prefills_of_one_step(window: int | None, sinks: bool) -> None:
    check(Case(4, 2, 2, 8, window, [9, 0, 4, 0, 31], [1, 6, 3, 1, 1], seed=1, sinks=sinks))


def test_a_table_may_be_longer_than_the_sequence() -> None:
    case = Case(4, 1, 1, 4, None, held=[5], new=[1], seed=0)
    item = scheduled(0, 5, 1, (BlockId(2), BlockId(0), BlockId(7)))
    batch = plan_attention([item], case.block_size, CPU)
    assert batch.decode_blocks_BN.tolist() == [[2, 0]]
    assert batch.write_slots_T.tolist() == [0 * 4 + 1]


def test_the_layout_of_a_step() -> None:
    items = [scheduled(0, 2, 3, (BlockId(5), BlockId(1))), scheduled(1, 4, 1, (3, 2))]
    batch = plan_attention(items, 4, CPU)
    assert batch.positions_T.tolist() == [2, 3, 4, 4]
    assert batch.write_slots_T.tolist() == [22, 23, 4, 8]
    assert batch.decode_rows_B.tolist() == [3]
    assert batch.decode_mask_BL.tolist() == [[True] * 5 + [False] * 3]
    (prefill,) = batch.prefills
    assert (prefill.row, prefill.count, prefill.start) == (0, 3, 2)
    assert prefill.blocks.tolist() == [5, 1]


@pytest.mark.parametrize(("held", "new"), [([6, 11], [1, 1]), ([0, 3], [5, 2]), ([4, 9], [3, 1])])
def test_latents_are_expanded_after_the_read(held: list[int], new: list[int]) -> None:
    heads, latent, rotary, dim = 3, 6, 2, 4
    torch.manual_seed(0)
    case = Case(4, 1, heads, dim, None, held, new, seed=3)
    tables, num_blocks = tables_of(case)
    cache = PagedCache([((1, latent), (1, rotary))], num_blocks, 4, torch.float32, CPU)
    module = LatentAttention(cache, heads, latent, dim)
    latents = [torch.randn(n, 1, latent) for n in case.lengths]
    rotaries = [torch.randn(n, 1, rotary) for n in case.lengths]
    filled(cache, tables, latents, rotaries)
    cache.batch = plan_attention(items_of(case, tables), 4, CPU)
    queries = [torch.randn(heads, n, dim + rotary) for n in new]
    key = value = torch.zeros(1, 1, sum(new), dim)
    out, _ = paged_attention(module, torch.cat(queries, 1)[None], key, value, None)
    expected = []
    for query, lat, rot, start in zip(queries, latents, rotaries, held, strict=True):
        full = module.expand_kv(lat.transpose(0, 1)[None], rot.transpose(0, 1)[None])
        expected.append(dense(query, full[0][0], full[1][0], start, None).transpose(0, 1))
    torch.testing.assert_close(out[0], torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_scale_of_its_own() -> None:
    cache = PagedCache([((1, 4), (1, 4))], 2, 4, torch.float32, CPU)
    cache.batch = plan_attention([scheduled(0, 0, 3, (BlockId(0),))], 4, CPU)
    key, value, query = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    cache.update(key, value, 0)
    scaled, _ = paged_attention(Attention(cache), query, key, value, None, scaling=2.0)
    expected = dense(query[0] * 4.0, key[0], value[0], 0, None)  # 4 = 2 * sqrt(4)
    torch.testing.assert_close(scaled[0].transpose(0, 1), expected)


def test_pages_begin_as_zeros() -> None:
    """A NaN in a masked slot would leak through attention."""
    cache = PagedCache([((2, 4), (1, 3))], 5, 4, torch.bfloat16, CPU)
    assert [p.shape for p in cache.pages[0]] == [(5, 4, 2, 4), (5, 4, 1, 3)]
    assert all(not p.any() and p.dtype == torch.bfloat16 for p in cache.pages[0])


@pytest.mark.parametrize("feature", ["bias", "softcap"])
def test_features_that_would_be_lost_are_refused(feature: str) -> None:
    zeros = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match=feature):
        paged_attention(
            Attention(ProbeCache(torch.float32, False)), zeros, zeros, zeros, None, **{feature: 1.0}
        )


def test_the_probe_learns_the_shapes() -> None:
    probe = ProbeCache(torch.float32, alone=False)
    probe.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 6), 3)
    assert probe.shapes == {3: ((2, 8), (1, 6))}
    query = torch.ones(1, 4, 1, 8)
    out, _ = paged_attention(Attention(probe), query, query, torch.zeros(1, 1, 1, 6), None)
    assert out.shape == (1, 1, 4, 6)
    assert not out.any()


def test_the_probe_refuses_what_pages_or_our_own_attention_cannot_take() -> None:
    narrow, zeros = torch.zeros(1, 1, 1, 4).bfloat16(), torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        ProbeCache(torch.float32, alone=False).update(zeros, narrow, 0)
    probe = Attention(ProbeCache(torch.float32, alone=True))
    paged_attention(probe, zeros, zeros, zeros, None)
    with pytest.raises(BatchVariant):
        paged_attention(probe, narrow, zeros, zeros, None)
