"""Routers that can leave out missing experts: masking acts on what top-k sees.

`transformers` has no hook for routers, so each router module is wrapped after construction. While
nothing is missing the original runs, untouched. A masked form is only used for a router whose
unmasked output it reproduces bit for bit; any other router is reported as not maskable.

In every form choices beyond the healthy experts have weight 0, also when no expert is left at all.
NaN in a hidden state stays NaN in its weights.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import nn
from torch.nn.functional import linear, softmax

from revivemoe.kernels.native import MOST_CHOICES, Native

MaskedForm = Callable[..., tuple[torch.Tensor, ...]]
"""Of router, hidden states, mask, and what the router is given beside the hidden states."""
NEG_INF = float("-inf")
TINY = torch.finfo(torch.float32).tiny
"""Below any sum of the K largest of E probabilities: only keeps 0 / 0 from being NaN."""


def softmax_then_top_k(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen, Mixtral, OLMoE: masked logits are minus infinity before the softmax.

    Returns (logits [T, E], weights [T, K], experts [T, K]).
    """
    hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1])
    logits_TE = linear(hidden_TH, router.weight).masked_fill(missing_E, NEG_INF)
    probs_TE = _healthy_first(softmax(logits_TE.float(), dim=-1), missing_E)
    weights_TK, experts_TK = torch.topk(probs_TE, router.top_k, dim=-1)
    weights_TK = weights_TK.clamp_min(0.0)
    if getattr(router, "norm_topk_prob", True):
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(TINY)
    if hasattr(router, "norm_topk_prob"):
        weights_TK = weights_TK.to(logits_TE.dtype)
    return logits_TE, weights_TK, experts_TK


def top_k_then_softmax(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gpt-oss: the logits chosen are softened among themselves; a masked one has no part in it."""
    hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1])
    logits_TE = linear(hidden_TH, router.weight, router.bias).masked_fill(missing_E, NEG_INF)
    picked_TK, experts_TK = torch.topk(logits_TE, router.top_k, dim=-1)
    weights_TK = softmax(picked_TK, dim=1, dtype=picked_TK.dtype)
    return logits_TE, weights_TK.masked_fill(picked_TK == NEG_INF, 0.0), experts_TK


def top_k_then_wide_softmax(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Granite: as gpt-oss, without a bias, and in float32."""
    logits_TE = linear(hidden_TH, router.weight).float().masked_fill(missing_E, NEG_INF)
    picked_TK, experts_TK = logits_TE.topk(router.top_k, dim=-1)
    weights_TK = softmax(picked_TK, dim=-1).masked_fill(picked_TK == NEG_INF, 0.0)
    return logits_TE, weights_TK.type_as(hidden_TH), experts_TK


def biased_softmax(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ERNIE 4.5: probabilities with a bias are what is chosen among, those without are weights."""
    logits_TE = linear(hidden_TH.float(), router.weight.float()).masked_fill(missing_E, NEG_INF)
    probs_TE = softmax(logits_TE, dim=1, dtype=torch.float)
    choice_TE = router.moe_statics(probs_TE).masked_fill(missing_E, NEG_INF)
    picked_TK, experts_TK = torch.topk(choice_TE, router.top_k, dim=-1)
    weights_TK = probs_TE.gather(-1, experts_TK).masked_fill(picked_TK == NEG_INF, 0.0)
    total_T1 = torch.clamp(weights_TK.sum(dim=-1, keepdim=True), min=router.norm_min)
    return logits_TE, (weights_TK / total_T1).to(hidden_TH.dtype), experts_TK


def biased_sigmoid(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor, bias_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MiniMax-M2, Hunyuan 3: a masked expert cannot be chosen whatever its bias."""
    hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1])
    scaled = hasattr(router, "router_scaling_factor")
    if scaled:
        logits_TE = linear(hidden_TH.float(), router.weight.float())
    else:
        logits_TE = linear(hidden_TH.to(router.weight.dtype), router.weight)
    scores_TE = logits_TE.float().sigmoid()
    choice_TE = (scores_TE + bias_E).masked_fill(missing_E, NEG_INF)
    picked_TK, experts_TK = torch.topk(choice_TE, router.top_k, dim=-1, sorted=False)
    weights_TK = scores_TE.gather(1, experts_TK).masked_fill(picked_TK == NEG_INF, 0.0)
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    if scaled:
        weights_TK = weights_TK / (total_T1 + 1e-20) * router.router_scaling_factor
    else:
        weights_TK = weights_TK / total_T1.clamp_min(TINY)
    return logits_TE, weights_TK, experts_TK


def grouped_softmax(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepSeek-V2, with and without group limits: masked logits are minus infinity.

    A group scores with its best healthy expert, so one is enough to stay selectable; a group with
    none scores below every other.
    """
    hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1]).float()
    logits_TE = linear(hidden_TH, router.weight.float()).masked_fill(missing_E, NEG_INF)
    scores_TE = _healthy_first(softmax(logits_TE, dim=-1), missing_E)
    if router.topk_method == "group_limited_greedy":
        groups_TGM = scores_TE.unflatten(-1, (router.num_group, -1))
        group_scores = groups_TGM.max(dim=-1).values
        open_TE = _open_experts(group_scores, router.topk_group, groups_TGM.shape[-1])
        scores_TE = scores_TE.masked_fill(~open_TE & ~missing_E, 0.0)
    weights_TK, experts_TK = torch.topk(scores_TE, k=router.top_k, dim=-1, sorted=False)
    return logits_TE, weights_TK.clamp_min(0.0) * router.routed_scaling_factor, experts_TK


def grouped_sigmoid(
    router: nn.Module, hidden_TH: torch.Tensor, missing_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepSeek-V3, GLM-4: a masked expert cannot be chosen whatever its correction bias.

    A group scores with its two best healthy experts; one that is not there adds 0, so a group with
    one stays selectable and a group with none is never selected. Weights of surplus choices are 0.
    """
    hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1]).float()
    logits_TE = linear(hidden_TH, router.weight.float())
    scores_TE = logits_TE.sigmoid()
    choice_TE = scores_TE + router.e_score_correction_bias
    num_groups, per_group = router.num_group, router.num_experts // router.num_group
    by_group = choice_TE.masked_fill(missing_E, NEG_INF).view(-1, num_groups, per_group)
    best = by_group.topk(min(2, per_group), dim=-1)[0]
    group_scores = best.masked_fill(best == NEG_INF, 0.0).sum(dim=-1)
    dead_G = missing_E.view(num_groups, per_group).all(dim=-1)
    group_scores = group_scores.masked_fill(dead_G, NEG_INF)
    open_TE = _open_experts(group_scores, router.topk_group, per_group)
    choice_TE = choice_TE.masked_fill(~open_TE | missing_E, NEG_INF)
    picked_TK, experts_TK = torch.topk(choice_TE, router.top_k, dim=-1, sorted=False)
    weights_TK = scores_TE.gather(1, experts_TK).masked_fill(picked_TK == NEG_INF, 0.0)
    if router.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return logits_TE, weights_TK * router.routed_scaling_factor, experts_TK


def _healthy_first(probs_TE: torch.Tensor, missing_E: torch.Tensor) -> torch.Tensor:
    """Masked experts below 0, so that even a healthy one whose probability underflowed is ahead.

    It also overwrites the NaN of a softmax over nothing, when all experts are masked.
    """
    return probs_TE.masked_fill(missing_E, -1.0)


def _open_experts(group_scores_TG: torch.Tensor, num_open: int, per_group: int) -> torch.Tensor:
    """[T, E] bool: the experts of each token's `num_open` best groups."""
    chosen = group_scores_TG.topk(num_open, dim=-1, sorted=False)[1]
    open_TG = torch.zeros_like(group_scores_TG).scatter_(1, chosen, 1).bool()
    return open_TG.repeat_interleave(per_group, dim=-1)


MASKED_FORMS: tuple[MaskedForm, ...] = (
    softmax_then_top_k,
    grouped_sigmoid,
    grouped_softmax,
    top_k_then_softmax,
    top_k_then_wide_softmax,
    biased_softmax,
    biased_sigmoid,
)


class MaskableRouter(nn.Module):
    """The original router, or its masked form while experts of this layer are missing."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.form = find_masked_form(original)
        self._native: Native | None = None
        self._missing_E: torch.Tensor | None = None
        self._mask_E: torch.Tensor | None = None
        """In graph mode there is a mask always, or never."""

    def go_by_mask(self, wanted: bool) -> None:
        """Graph mode: what is missing is a tensor from now on, whatever is in it."""
        self._native, self._mask_E = None, None
        if wanted and self.form is not None:
            weight = self.original.weight
            self._mask_E = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)

    def use(self, native: Native) -> None:
        """Choose by our own kernel, masked or not, if this router is of the form that it has."""
        router = self.original
        if self.form is not softmax_then_top_k or not native.fits(router.weight):
            return
        if router.top_k <= min(len(router.weight), MOST_CHOICES):
            self._native = native

    def _choose(self, native: Native, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        router = self.original
        kept = hasattr(router, "norm_topk_prob")
        return native.route(
            hidden_TH.reshape(-1, hidden_TH.shape[-1]),
            router.weight,
            router.top_k,
            getattr(router, "norm_topk_prob", True),
            router.weight.dtype if kept else torch.float32,
            self._missing_E,
        )

    def set_missing(self, missing_E: torch.Tensor) -> None:
        """Mask the experts where the [E] bool tensor is True."""
        any_missing = bool(missing_E.any())
        assert not any_missing or self.form is not None, "this router cannot be masked"
        self._missing_E = missing_E if any_missing else None
        if self._mask_E is not None:
            self._mask_E.copy_(missing_E)

    def forward(self, hidden_TH: torch.Tensor, *args: object, **kwargs: object) -> object:
        """What the original returns; the masked form gives a tuple of tensors like its own."""
        if self._native is not None and not args and hidden_TH.dtype == self.original.weight.dtype:
            return self._choose(self._native, hidden_TH)
        if self._mask_E is not None and self.form is not None:
            return self.form(self.original, hidden_TH, self._mask_E, *args)
        if self._missing_E is None or self.form is None:
            return self.original(hidden_TH, *args, **kwargs)
        return self.form(self.original, hidden_TH, self._missing_E, *args)


@torch.no_grad()
def find_masked_form(router: nn.Module) -> MaskedForm | None:
    """The masked form that reproduces this router exactly when nothing is masked, if any does."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, weight.shape[1], generator=generator).to(weight)
    bias = torch.rand(weight.shape[0], generator=generator).to(weight.device)
    nothing = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    for form, given in product(MASKED_FORMS, ((), (bias,))):
        try:
            expected, got = router(hidden, *given), form(router, hidden, nothing, *given)
        except (AttributeError, TypeError, RuntimeError):
            continue  # another family's router
        if _same(expected, got):
            return form
    return None


def _same(expected: object, got: tuple[torch.Tensor, ...]) -> bool:
    if not isinstance(expected, tuple) or len(expected) != len(got):
        return False
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, got, strict=True))
