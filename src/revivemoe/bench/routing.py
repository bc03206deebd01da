"""What the routers of a `transformers` model choose among, and how narrowly.

For those who need prompts on which arithmetic noise cannot change the outcome: another batch shape
moves router logits by ~1e-6. Legend: T positions, E experts, G groups.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

ROUTER_GAP = 1e-5
LOGIT_MARGIN = 1e-3

Masked = Mapping[int, Set[int]]
"""Decoder layer -> experts that may not be chosen there."""
NOTHING: Masked = {}


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer -> its router module."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                found[index] = module
    return found


@dataclass(frozen=True)
class Choice:
    """What a router's top-k sees, masks applied. Minus infinity: cannot be chosen."""

    scores_TE: Tensor
    groups_TG: Tensor | None
    """Scores of the groups, where only some groups are open to a token."""
    weights_TE: Tensor
    """Weight each expert would have if chosen, before renormalisation."""


def choice(router: nn.Module, logits_TE: Tensor, masked: Set[int]) -> Choice:
    """Router logits to scores, family by family, with `masked` experts left out."""
    alive_E = torch.tensor([e not in masked for e in range(router.num_experts)])
    if hasattr(router, "e_score_correction_bias"):
        return _sigmoid_choice(router, logits_TE, alive_E)
    probs_TE = torch.where(alive_E, logits_TE.float(), float("-inf")).softmax(-1)
    scores_TE = torch.where(alive_E, probs_TE, float("-inf"))
    return Choice(scores_TE=scores_TE, groups_TG=None, weights_TE=probs_TE)


def _sigmoid_choice(router: nn.Module, logits_TE: Tensor, alive_E: Tensor) -> Choice:
    sigmoid_TE = logits_TE.float().sigmoid()
    scores_TE = torch.where(alive_E, sigmoid_TE + router.e_score_correction_bias, float("-inf"))
    groups_TG = None
    if router.num_group > 1:
        groups_TG, scores_TE = _groups(router, scores_TE)
    # What cannot be chosen has no weight, should too few be left for the router's top-k.
    weights_TE = torch.where(scores_TE.isinf(), 0.0, sigmoid_TE)
    return Choice(scores_TE=scores_TE, groups_TG=groups_TG, weights_TE=weights_TE)


def _groups(router: nn.Module, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the groups, and those of the experts with the closed groups left out."""
    members = scores_TE.chunk(router.num_group, dim=-1)
    groups_TG = torch.stack([_group_score(m) for m in members], dim=-1)
    open_TG = torch.zeros_like(groups_TG).scatter(
        -1, groups_TG.topk(router.topk_group, dim=-1).indices, 1.0
    )
    open_TE = open_TG.repeat_interleave(members[0].shape[-1], dim=-1)
    return groups_TG, torch.where(open_TE > 0, scores_TE, float("-inf"))


def _group_score(scores_TM: Tensor) -> Tensor:
    """Sum of the two best; a missing second counts 0, a group with none cannot be chosen."""
    best, second = scores_TM.topk(2, dim=-1).values.unbind(-1)
    return torch.where(second.isinf(), best, best + second)


# ---- gaps -----------------------------------------------------------------------------------


@dataclass
class Gaps:
    """Per layer, per token: how far the choice of experts and groups was from another."""

    layers: list[Tensor]

    def smallest(self) -> Tensor:
        """Over the layers, for each token."""
        return torch.stack(self.layers).amin(0)


@contextmanager
def observed_gaps(model: nn.Module, masked: Masked = NOTHING) -> Iterator[Gaps]:
    """Filled by the forwards that are made while inside."""
    gaps = Gaps(layers=[])

    def observe(layer: int) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        def hook(router: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
            seen = choice(router, output[0], masked.get(layer, frozenset()))
            gap = _gap(seen.scores_TE, router.top_k)
            if seen.groups_TG is not None:
                gap = torch.minimum(gap, _gap(seen.groups_TG, router.topk_group))
            gaps.layers.append(gap)

        return hook

    handles = [r.register_forward_hook(observe(layer)) for layer, r in routers(model).items()]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()


def _gap(scores: Tensor, k: int) -> Tensor:
    """The k-th largest less the next; infinite where nothing more can be chosen."""
    if scores.shape[-1] <= k:
        return torch.full(scores.shape[:-1], inf)
    sorted_scores = scores.sort(-1, descending=True).values
    above, below = sorted_scores[..., k - 1], sorted_scores[..., k]
    return torch.where(below.isinf(), inf, above - below)
