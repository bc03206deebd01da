"""How close a draw was to another outcome: for the screening of test prompts."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from revivemoe.model.sampling import SamplingRow, _edited, _keep, uniform
from revivemoe.sampling_params import SamplingParams


@dataclass(frozen=True)
class DrawMargins:
    """How far a row was from another outcome."""

    logit: float
    """Greedy: the best logit less the second. Drawn: the gap at the top_k and min_p cut-offs."""
    probability: float
    """Distance of the uniform number from the interval's ends, and of top_p from a partial sum."""


def draw_margins(logits_V: Tensor, row: SamplingRow) -> DrawMargins:
    """The margins of the draw that `sample` makes for this row."""
    edited_BV = _edited(logits_V.float()[None], [row])
    if row.greedy:
        best, second = edited_BV[0].topk(2).values.tolist()
        return DrawMargins(logit=best - second, probability=inf)
    params = row.params
    scaled_V = edited_BV[0].double() / params.temperature
    kept_V = _keep(scaled_V[None].clone(), [params])[0]
    draw = _interval_margin(kept_V, uniform(params.seed, params.choice, len(row.output_ids)))
    cut_logit, cut_probability = _cut_margins(scaled_V, params)
    return DrawMargins(logit=cut_logit, probability=min(draw, cut_probability))


def _interval_margin(kept_V: Tensor, draw: float) -> float:
    """Distance of `draw` from the nearer end of the interval that it falls into."""
    cdf_V = kept_V.softmax(-1).cumsum(-1)
    cdf_V /= cdf_V[-1].clone()
    inner_V = cdf_V[(cdf_V > 0) & (cdf_V < 1)]  # 0 and 1 are ends of the range, not boundaries
    return float((inner_V - draw).abs().min()) if len(inner_V) else inf


def _cut_margins(scaled_V: Tensor, params: SamplingParams) -> tuple[float, float]:
    """(logit, probability) distances from keeping one token more or fewer."""
    logit = probability = inf
    if params.min_p > 0:
        floor = scaled_V.max() + torch.tensor(params.min_p).log()
        logit = float((scaled_V - floor).abs().min())
        scaled_V = scaled_V[scaled_V >= floor]
    sorted_V = scaled_V.sort(descending=True).values
    if 0 < params.top_k < len(sorted_V):
        logit = min(logit, float(sorted_V[params.top_k - 1] - sorted_V[params.top_k]))
        sorted_V = sorted_V[: params.top_k]
    if params.top_p < 1:
        probability = float((sorted_V.softmax(-1).cumsum(-1) - params.top_p).abs().min())
    return logit, probability
