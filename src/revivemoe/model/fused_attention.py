"""Attention modules whose queries, keys and values our kernels make in one call, pages included.

Which modules do what that call does, their own code shows: both compute the same rows over pages,
and what comes out must agree.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from revivemoe.kernels.native import Head, Native
from revivemoe.model.native_modules import norm_eps
from revivemoe.model.paged import AttentionBatch, PagedCache, attend
from revivemoe.model.probe import WITHOUT_MEANING_HERE, Attends

FEW = 32
"""Up to so many rows what is called less often outweighs whose products are faster."""
TAKEN = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
TRIED, BLOCK = 3, 4
"""Rows that a module is tried with, and positions of each one's block of pages, the last one its
own."""


def fuse_attention(
    modules: Sequence[nn.Module],
    learned: Sequence[Attends],
    dtype: torch.dtype,
    native: Native,
    rows_of: Mapping[tuple[int, ...], int],
) -> int:
    """Change `forward` of the modules that do what one call of ours does; returns how many.

    `learned`: by layer, from the probe. `rows_of`: up to how many rows our product is the faster
    one, by shape of its weight.
    """
    tried = PagedCache(
        [one.shape for one in learned], TRIED, BLOCK, dtype, torch.device("cpu"), native
    )
    tried.batch = _batch()
    count = 0
    for module in modules:
        given = learned[module.layer_idx]
        if not _is_plain(module, given, native, dtype):
            continue
        shapes = (tuple(of.weight.shape) for of in (module.q_proj, module.k_proj, module.v_proj))
        most = max(min(rows_of.get(shape, 0) for shape in shapes), FEW)
        fused = FusedAttention(module, native, most, given)
        if _agree(module, fused, tried, dtype):
            module.forward = fused
            count += 1
    return count


def _is_plain(module: nn.Module, given: Attends, native: Native, dtype: torch.dtype) -> bool:
    """Whether it is made of the parts that our call takes."""
    parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    (_, dim), _ = given.shape
    if not all(type(part) is nn.Linear for part in parts) or hasattr(module, "expand_kv"):
        return False
    weights = [module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]
    if dim % 2 or not all(native.fits(w) and w.dtype == dtype for w in weights):
        return False
    if not (_fit(module, given) and _takes_no_more(module)):
        return False
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    return norms == [None, None] or all(_is_head_norm(norm, dim, dtype) for norm in norms)


def _fit(module: nn.Module, given: Attends) -> bool:
    """Whether the weights make just what the pages keep: nothing else is looked at later."""
    (heads, dim), (value_heads, dim_v) = given.shape
    query, key, value = module.q_proj, module.k_proj, module.v_proj
    inner, biases = query.weight.shape[1], [p.bias for p in (query, key, value)]
    return (
        heads == value_heads
        and key.weight.shape == (heads * dim, inner)
        and value.weight.shape == (heads * dim_v, inner)
        and query.weight.shape[0] % (heads * dim) == 0
        and all(b is None or (b.dtype == query.weight.dtype and b.is_contiguous()) for b in biases)
    )


def _takes_no_more(module: nn.Module) -> bool:
    """Whether it is given nothing, by name, that it may make something of."""
    named = {
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    return named <= TAKEN | (WITHOUT_MEANING_HERE - {"position_ids"})


def _is_head_norm(norm: nn.Module | None, dim: int, dtype: torch.dtype) -> bool:
    weight = getattr(norm, "weight", None)
    return (
        norm is not None
        and norm_eps(norm) is not None
        and isinstance(weight, Tensor)
        and (weight.shape, weight.dtype) == ((dim,), dtype)
    )


def _batch() -> AttentionBatch:
    """Of each sequence one row, at the end of a block."""
    rows, lengths = torch.arange(TRIED), torch.full((TRIED,), BLOCK)
    return AttentionBatch(
        positions_T=lengths - 1,
        write_slots_T=rows * BLOCK + BLOCK - 1,
        decode_rows_B=rows,
        decode_blocks_BN=rows[:, None].contiguous(),
        decode_mask_BL=torch.ones(TRIED, BLOCK, dtype=torch.bool),
        decode_lengths_B=lengths,
        prefills=(),
    )


def _agree(
    module: nn.Module, fused: "FusedAttention", cache: PagedCache, dtype: torch.dtype
) -> bool:
    """Whether both give the same for the same rows, and leave the same in the pages."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    pages, dim = cache.pages[module.layer_idx], cache.pages[module.layer_idx][0].shape[3]
    before = [drawn(*of_layer.shape) for of_layer in pages]
    half = torch.rand(1, TRIED, dim // 2, generator=generator) * 6
    angles = torch.cat([half, half], -1)
    hidden = drawn(1, TRIED, module.q_proj.in_features)
    module.revive_cache, found = cache, []
    for forward in (module.forward, fused):
        for of_layer, values in zip(pages, before, strict=True):
            of_layer.copy_(values)
        try:
            out = forward(
                hidden_states=hidden,
                position_embeddings=(angles.cos().to(dtype), angles.sin().to(dtype)),
                attention_mask=None,
                past_key_values=cache,
            )
        except Exception:  # others' code, that takes something else
            return False
        found.append([out[0], *(of_layer.clone() for of_layer in pages)])
    (out, *theirs), (our_out, *ours) = found
    return _near(our_out, out) and all(map(_same_pages, ours, theirs))


def _same_pages(one: Tensor, other: Tensor) -> bool:
    """What was written is near, and the rest is untouched."""
    one, other = one.flatten(0, 1), other.flatten(0, 1)
    written = torch.zeros(len(one), dtype=torch.bool)
    written[_batch().write_slots_T] = True
    return torch.equal(one[~written], other[~written]) and _near(one[written], other[written])


def _near(one: Tensor, other: Tensor) -> bool:
    """To some roundings of the dtype, beside the largest value."""
    if one.shape != other.shape:
        return False
    error, largest = (one - other).abs().max(), other.abs().max()
    return bool(error <= 8 * torch.finfo(one.dtype).eps * largest)


class FusedAttention:
    """In the place of a module's `forward`, for few rows."""

    def __init__(self, module: nn.Module, native: Native, most: int, given: Attends) -> None:
        self._module, self._native, self._most, self._given = module, native, most, given
        self._forward = module.forward

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """[1, T, H] to [1, T, H]."""
        if (
            position_embeddings is None
            or not isinstance(past_key_values, PagedCache)
            or hidden_states.shape[1] > self._most
            or not self._can_turn(position_embeddings[0], hidden_states)
        ):
            return self._forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return self._compute(hidden_states[0], position_embeddings, past_key_values), None

    def _can_turn(self, cos: Tensor, hidden_states: Tensor) -> bool:
        (_, dim), _ = self._given.shape
        return cos.dtype == hidden_states.dtype and cos.shape == (*hidden_states.shape[:2], dim)

    def _compute(self, rows_TH: Tensor, angles: tuple[Tensor, Tensor], cache: PagedCache) -> Tensor:
        module, given = self._module, self._given
        assert cache.batch is not None, "the cache is written outside a step"
        pages = cache.pages[module.layer_idx]
        cos, sin = (x.reshape(len(rows_TH), -1).contiguous() for x in angles)
        query_THD = self._native.project(
            rows_TH.contiguous(),
            _head(module.q_proj, getattr(module, "q_norm", None)),
            _head(module.k_proj, getattr(module, "k_norm", None)),
            (module.v_proj.weight, module.v_proj.bias),
            (cos, sin),
            cache.batch.write_slots_T,
            pages,
        )
        out_THD = attend(
            module, query_THD.transpose(0, 1)[None], pages[1].shape[3],
            given.scale, given.window, given.sinks,
        )  # fmt: skip
        out: Tensor = module.o_proj(out_THD.view(1, len(rows_TH), -1))
        return out


def _head(projection: nn.Linear, norm: nn.Module | None) -> Head:
    if norm is None:
        return Head(projection.weight, projection.bias, None, 0.0)
    eps = norm_eps(norm)
    assert eps is not None, "a norm that was tried"
    return Head(projection.weight, projection.bias, norm.weight, eps)
