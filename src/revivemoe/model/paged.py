"""Paged KV cache and the attention over it, behind the two hooks `transformers` offers.

Shapes: NB blocks, P block size (positions per block), T tokens of the step (all sequences
flattened to one row), B decoding sequences, L padded context, Hq/Hk query and KV heads, G = Hq/Hk.
MLA models hand over compressed latents (one "head"); they are expanded after the page read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from revivemoe.core.step import ScheduledSequence
from revivemoe.ids import BlockId
from revivemoe.kernels.native import Native, Seen
from revivemoe.model.probe import KVShape, ProbeCache


@dataclass(frozen=True)
class PrefillItem:
    """One sequence's chunk of `count` > 1 tokens (or the first token of a prompt)."""

    row: int
    count: int
    start: int
    blocks: Tensor
    """[ceil((start+count)/P)] int64"""


@dataclass(frozen=True)
class AttentionBatch:
    """Where this step's tokens are written and what each of them may read."""

    positions_T: Tensor
    write_slots_T: Tensor
    """Flat slot (block * P + offset) of each token."""
    decode_rows_B: Tensor
    decode_blocks_BN: Tensor
    decode_mask_BL: Tensor
    """True where a decoding sequence may look."""
    decode_lengths_B: Tensor
    """Positions it may look at, int64."""
    prefills: tuple[PrefillItem, ...]


def plan_attention(
    items: Sequence[ScheduledSequence], block_size: int, device: torch.device, alone: bool = False
) -> AttentionBatch:
    """Lay a step's sequences out as one row of tokens, in the order of `items`.

    `alone`: every token is to attend as if it were decoded, whatever is computed beside it: the
    `decode_` fields have them all, and `prefills` every sequence.
    """
    positions: list[int] = []
    slots: list[int] = []
    decodes: list[tuple[int, int, ScheduledSequence]] = []
    prefills: list[PrefillItem] = []
    for item in items:
        row = len(positions)
        span = range(item.start, item.start + item.count)
        positions.extend(span)
        table = item.block_table
        slots.extend(table[p // block_size] * block_size + p % block_size for p in span)
        if item.count == 1 or alone:
            decodes += [(row + i, at + 1, item) for i, at in enumerate(span)]
        if item.count > 1 or alone:
            num_blocks = -(-(item.start + item.count) // block_size)
            blocks = torch.tensor(table[:num_blocks], dtype=torch.int64, device=device)
            prefills.append(PrefillItem(row, item.count, item.start, blocks))
    lengths = [length for _, length, _ in decodes]
    tables = [item.block_table for _, _, item in decodes]
    blocks_BN, mask_BL = _pad_tables(tables, lengths, block_size)
    return AttentionBatch(
        positions_T=torch.tensor(positions, dtype=torch.int64, device=device),
        write_slots_T=torch.tensor(slots, dtype=torch.int64, device=device),
        decode_rows_B=torch.tensor([r for r, _, _ in decodes], dtype=torch.int64, device=device),
        decode_blocks_BN=blocks_BN.to(device),
        decode_mask_BL=mask_BL.to(device),
        decode_lengths_B=torch.tensor(lengths, dtype=torch.int64, device=device),
        prefills=tuple(prefills),
    )


def _pad_tables(
    tables: Sequence[Sequence[BlockId]], lengths: Sequence[int], block_size: int
) -> tuple[Tensor, Tensor]:
    """Block tables padded with block 0, and the mask that hides the padding."""
    width = max((-(-n // block_size) for n in lengths), default=0)
    rows = []
    for table, length in zip(tables, lengths, strict=True):
        used = list(table[: -(-length // block_size)])
        rows.append(used + [0] * (width - len(used)))
    blocks = torch.tensor(rows, dtype=torch.int64).view(len(tables), width)
    mask = torch.arange(width * block_size)[None, :] < torch.tensor(lengths)[:, None]
    return blocks, mask.view(len(tables), width * block_size)


class PagedCache:
    """Pages of every layer. Passed to the model as `past_key_values`.

    Zero-initialised: a NaN in a masked slot would leak through attention.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        native: Native | None = None,
        alone: bool = False,
    ) -> None:
        """`shapes`: by layer. `alone`: every token attends as if it were the only one."""

        def pages(heads: int, dim: int) -> Tensor:
            shape = (num_blocks, block_size, heads, dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_size = block_size
        self.pages = [(pages(*key), pages(*value)) for key, value in shapes]
        self.native, self.alone = native, alone
        self.batch: AttentionBatch | None = None
        self.eager_calls = 0
        """In graph mode: layers that were run without their graph."""
        self.clock: Tensor | None = None
        """In graph mode: ties what reads the pages to what has written them before."""
        self.on_attention: Callable[[int, int], None] = lambda layer, num_tokens: None
        """Called with (layer, tokens of the step) before each layer reads its pages."""

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write this step's [1, H, T, D] keys and values (or latents) into their slots."""
        if self.clock is not None:
            torch.ops.revivemoe.keep(key, value, self.clock, layer_idx)
        else:
            self.write(key, value, layer_idx)
        return key, value

    def write(self, key: Tensor, value: Tensor, layer_idx: int) -> None:
        assert self.batch is not None, "the cache is written outside a step"
        for pages, new in zip(self.pages[layer_idx], (key, value), strict=True):
            flat = pages.view(-1, *pages.shape[2:])
            flat.index_copy_(0, self.batch.write_slots_T, new[0].transpose(0, 1))

    def zero(self, slots: Tensor) -> None:
        """Zero flat slots (block * P + offset), [N] int64, in every layer."""
        for pair in self.pages:
            for pages in pair:
                pages.view(-1, *pages.shape[2:]).index_fill_(0, slots, 0)

    def decodes_natively(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether single queries of this dtype can read the layer's pages where they lie."""
        keys, _ = self.pages[module.layer_idx]
        if self.native is None or hasattr(module, "expand_kv") or keys.dtype != dtype:
            return False
        return self.native.attends(keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly; this is only asked for defaults."""
        return 0

    def read(self, module: nn.Module, layer_idx: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of block tables [..., N] as [..., L, H, D], latents expanded."""
        batch_shape = blocks.shape[:-1]
        key, value = (
            pages[blocks].view(*batch_shape, -1, *pages.shape[2:])
            for pages in self.pages[layer_idx]
        )
        if not hasattr(module, "expand_kv"):
            return key, value
        latent, rotary = (x.view(-1, *x.shape[-3:]).transpose(1, 2) for x in (key, value))
        full_key, full_value = module.expand_kv(latent, rotary)
        return tuple(
            x.transpose(1, 2).reshape(*batch_shape, x.shape[2], x.shape[1], x.shape[3])
            for x in (full_key, full_value)
        )


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of [1, Hq, T, D] queries over the pages; returns ([1, T, Hq, Dv], None).

    `s_aux`, [Hq]: sinks, logits of nothing that take their share of each softmax.
    Registered with `ALL_ATTENTION_FUNCTIONS`. `module.revive_cache` is set by the runner.
    What would be lost here is refused by the probe.
    """
    cache = module.revive_cache
    if isinstance(cache, ProbeCache):
        how = scaling, sliding_window, s_aux
        cache.attend(module.layer_idx, query.dtype, attention_mask, how, kwargs)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    dim_v = value.shape[3]
    if cache.clock is not None:
        if not torch.compiler.is_compiling():
            cache.eager_calls += 1
        given = module.layer_idx, dim_v, scaling, sliding_window, s_aux
        return torch.ops.revivemoe.attend(query, cache.clock, *given), None
    return attend(module, query, dim_v, scaling, sliding_window, s_aux)[None], None


def attend(
    module: nn.Module,
    query: Tensor,
    dim_v: int,
    scaling: float | None,
    sliding_window: int | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The same in a step, [T, Hq, Dv]: keys and values are in the pages."""
    cache = module.revive_cache
    batch = cache.batch
    cache.on_attention(module.layer_idx, query.shape[2])
    out_THD = query.new_empty(query.shape[2], query.shape[1], dim_v)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    read = partial(cache.read, module, module.layer_idx)
    sinks = None if s_aux is None else s_aux.float()
    if cache.alone and hasattr(module, "expand_kv"):
        for item in batch.prefills:
            _attend_expanded(cache, module, item, query, out_THD, scale, sliding_window, sinks)
        return out_THD
    if cache.decodes_natively(module, query.dtype):
        seen = Seen(batch.decode_rows_B, batch.decode_blocks_BN, batch.decode_lengths_B)
        pages = cache.pages[module.layer_idx]
        by_row = query[0].transpose(0, 1)
        cache.native.attend(by_row, *pages, seen, out_THD, scale, sliding_window, sinks)
    elif len(batch.decode_rows_B):
        out_THD[batch.decode_rows_B] = _decode(read, batch, query, scale, sliding_window, s_aux)
    for item in () if cache.alone else batch.prefills:
        rows = slice(item.row, item.row + item.count)
        out_THD[rows] = _prefill(read, item, query[0, :, rows], scale, sliding_window, s_aux)
    return out_THD


def _attend_expanded(
    cache: PagedCache,
    module: nn.Module,
    item: PrefillItem,
    query: Tensor,
    out_THD: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    """One sequence's tokens, each alone, over keys and values that its latents stand for."""
    assert cache.native is not None, "only native kernels compute a row alone"
    key, value = cache.read(module, module.layer_idx, item.blocks)
    rows = torch.arange(item.row, item.row + item.count)
    lengths = torch.arange(item.start + 1, item.start + item.count + 1)
    seen = Seen(rows, torch.zeros(item.count, 0, dtype=torch.int64), lengths)
    pages = key[None].contiguous(), value[None].contiguous()
    by_row = query[0].transpose(0, 1)
    cache.native.attend(by_row, *pages, seen, out_THD, scale, window, sinks)


Read = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`PagedCache.read` of one layer."""


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more key and value of zeros, that all may see, and whose logit is the head's sink: one
    more dimension in which only that key and the queries are not 0.

    `sinks` fits the query but for its last dimension; the others as attention takes them.
    """
    query = torch.cat([query, (sinks / scale).expand(query.shape[:-1])[..., None]], -1)
    key, value = (pad(x, (0, 1, 0, 1)) for x in (key, value))
    key[..., -1, -1] = 1
    return query, key, value[..., :-1], pad(mask, (0, 1), value=True)


def _decode(
    read: Read,
    batch: AttentionBatch,
    query: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """One query per sequence: the G query heads of a KV head take the place of query positions."""
    rows = batch.decode_rows_B
    key, value = read(batch.decode_blocks_BN)
    kv_heads, dim = key.shape[2:]
    query_BHGD = query[0].transpose(0, 1)[rows].view(len(rows), kv_heads, -1, dim)
    mask_BL = batch.decode_mask_BL
    if window is not None:
        last = batch.positions_T[rows][:, None]
        mask_BL = mask_BL & (torch.arange(mask_BL.shape[1], device=rows.device) > last - window)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if sinks is not None:
        of_heads = sinks.to(query.dtype).view(kv_heads, -1)
        query_BHGD, key, value, mask_BL = _with_sinks(
            query_BHGD, key, value, mask_BL, of_heads, scale
        )
    out = scaled_dot_product_attention(
        query_BHGD, key, value, attn_mask=mask_BL[:, None, None, :], scale=scale
    )
    return out.reshape(len(rows), -1, out.shape[-1])


def _prefill(
    read: Read,
    item: PrefillItem,
    query: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """A chunk of one sequence: causal over everything before it."""
    key, value = read(item.blocks)
    total = item.start + item.count
    key, value = key[:total], value[:total]
    kv_heads, dim = key.shape[1:]
    query_HGCD = query.view(kv_heads, -1, item.count, dim)
    at = torch.arange(item.start, total, device=query.device)[:, None]
    seen = torch.arange(total, device=query.device)[None, :]
    mask = seen <= at
    if window is not None:
        mask = mask & (seen > at - window)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if sinks is not None:
        of_heads = sinks.to(query.dtype).view(kv_heads, -1, 1)
        query_HGCD, key, value, mask = _with_sinks(query_HGCD, key, value, mask, of_heads, scale)
    groups = query_HGCD.shape[1]
    out = scaled_dot_product_attention(
        query_HGCD,
        key[:, None].expand(-1, groups, -1, -1),
        value[:, None].expand(-1, groups, -1, -1),
        attn_mask=mask,
        scale=scale,
    )
    return out.reshape(-1, item.count, out.shape[-1]).transpose(0, 1)
