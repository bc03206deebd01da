"""Two tokens through a loaded model, with stand-ins for cache and experts: what its layers keep,
and whether their attention is one that pages can be read for.

A model that would compute something else over pages than over its own cache is refused here, by
what it does and not by its name: what it asks its cache for, and what it hands to its attention.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from revivemoe.checkpoint.config import max_positions, text_config
from revivemoe.model.batch_invariant import BatchVariant
from revivemoe.model.load import CheckpointError

KVShape = tuple[tuple[int, int], tuple[int, int]]
"""((key heads, key dim), (value heads, value dim))"""


class Attends(NamedTuple):
    """What a layer keeps of a position, and how it attends."""

    shape: KVShape
    scale: float | None
    window: int | None
    sinks: Tensor | None


WITHOUT_MEANING_HERE = frozenset({
    "dropout", "position_ids", "cache_position", "is_causal", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits",
})  # fmt: skip
"""What models hand on to any attention. Anything else says something that would be lost."""


class ProbeCache:
    """Stands in for the pages once, to learn each layer's shapes from the model itself."""

    def __init__(self, dtype: torch.dtype, alone: bool) -> None:
        """`dtype`: of the pages. `alone`: only our own attention will do."""
        self._dtype, self._alone = dtype, alone
        self.shapes: dict[int, KVShape] = {}
        self.given: dict[int, tuple[float | None, int | None, Tensor | None]] = {}
        """Scale, window and sinks of the layers whose attention is ours."""

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.shapes:
            raise NotImplementedError(f"layer {layer_idx} keeps keys and values twice")
        if {key.dtype, value.dtype} != {self._dtype}:
            raise NotImplementedError(f"layer {layer_idx} keeps {_name(key)} and {_name(value)}")
        self.shapes[layer_idx] = (
            (key.shape[1], key.shape[3]),
            (value.shape[1], value.shape[3]),
        )
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def attend(
        self,
        layer_idx: int,
        of_query: torch.dtype,
        mask: Tensor | None,
        how: tuple[float | None, int | None, Tensor | None],
        others: Mapping[str, object],
    ) -> None:
        """A layer's attention is called. Raises NotImplementedError for what would be lost, and
        BatchVariant.
        """
        if self._alone and of_query != self._dtype:
            raise BatchVariant(f"layer {layer_idx} has queries of another dtype than its pages")
        given = {name for name, value in others.items() if value is not None}
        given -= WITHOUT_MEANING_HERE
        if mask is not None:
            given.add("a mask of its own")
        if others.get("is_causal") is False:
            given.add("no causal order")
        if given:
            raise NotImplementedError(f"attention with {', '.join(sorted(given))}")
        self.given[layer_idx] = how

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"its layers ask their cache for {name}")


@torch.inference_mode()
def probe(
    model: PreTrainedModel,
    attention: Sequence[nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    alone: bool,
) -> list[Attends]:
    """What each layer keeps of a position, in `dtype`, and how it attends. `alone`: as `Generator`
    has it. Raises CheckpointError for a model whose attention is not, or not only, what
    `paged_attention` computes; BatchVariant.
    """
    name = type(model).__name__
    cache = ProbeCache(dtype, alone)
    for module in attention:
        module.revive_cache = cache
    two = torch.arange(2, device=device)[None]
    try:
        model(input_ids=two, position_ids=two, past_key_values=cache, use_cache=True)
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # a device's trouble is none of the checkpoint's
    except BatchVariant:
        raise
    except (NotImplementedError, AttributeError) as error:  # mostly ours
        raise CheckpointError(f"{name} is not supported: {_said(error)}") from None
    except Exception as error:
        said = f"{type(error).__name__}: {_said(error)}"
        raise CheckpointError(f"{name} is not supported: {said}") from None
    if problem := _problem(model, cache):
        raise CheckpointError(f"{name} is not supported: {problem}")
    return [Attends(cache.shapes[layer], *cache.given[layer]) for layer in sorted(cache.shapes)]


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _problem(model: PreTrainedModel, cache: ProbeCache) -> str | None:
    layers = set(range(text_config(model.config).num_hidden_layers))
    if left := sorted(layers - cache.given.keys()):
        return f"layers {left[:8]} have no attention over keys and values that can be paged"
    if others := sorted(layers ^ cache.shapes.keys() | (cache.given.keys() - layers)):
        return f"layers {others[:8]} do not keep keys and values of their own"
    for layer, meant in enumerate(_windows(model)):
        if meant is not None and cache.given[layer][1] is None:
            return f"layer {layer} does not tell its attention of its sliding window of {meant}"
    return None


def _windows(model: PreTrainedModel) -> list[int | None]:
    """The window that the configuration gives each layer; None: it sees all that there can be."""
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    if not isinstance(window, int) or window >= max_positions(config, model.config.name_or_path)[0]:
        window = None
    return [
        window if not kinds or kinds[layer] == "sliding_attention" else None
        for layer in range(config.num_hidden_layers)
    ]
