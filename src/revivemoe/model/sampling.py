"""The next token, as a pure function of logits, parameters and history.

Order of operations (vLLM's): logit_bias, penalties, min_tokens, [greedy: argmax], temperature,
min_p, top_k, top_p, draw. The draw inverts the cumulative distribution *in vocabulary order* at one
uniform number that depends on (seed, choice, position) alone. So whichever rank continues a
sequence, in whatever batch, draws what the first would have drawn. Probabilities are float64: what
remains of rounding is far below the differences that another batch shape makes to the logits.

Legend: B rows (sequences), V vocabulary, T prompt positions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""
ROWS_AT_A_TIME = 32
"""Bounds the float64 copies that drawing makes of a large vocabulary."""


@dataclass(frozen=True)
class SamplingRow:
    """One sequence that takes its next token from the logits row of the same index."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def edits_logits(self) -> bool:
        p = self.params
        penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        return penalised or bool(p.logit_bias) or len(self.output_ids) < p.min_tokens


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Draw one token per row. Any float dtype, CPU or CUDA; no row affects another.

    Log-probabilities are those of the raw logits, before penalties and temperature.
    """
    assert len(rows) == logits_BV.shape[0]
    if not rows:
        return []
    logits_BV = logits_BV.float()
    tokens = _choose(_edited(logits_BV, rows), rows)
    logprobs = _sampled_logprobs(logits_BV, rows, tokens)
    return [SampledToken(t, lp) for t, lp in zip(tokens, logprobs, strict=True)]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1): 53 bits of the BLAKE2b hash of "seed:choice:position"."""
    digest = hashlib.blake2b(f"{seed}:{choice}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def token_logprobs(
    logits_TV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-probability of `token_ids[i]` under row i, and of its `num_top[i]` likeliest tokens.

    For prompt log-probabilities, row i is the output at the position *before* the token's.
    """
    if not token_ids:
        return []
    logprobs_TV = logits_TV.float().log_softmax(-1)
    targets = torch.tensor(token_ids, device=logprobs_TV.device)
    chosen = logprobs_TV.gather(1, targets[:, None])[:, 0].tolist()
    values, ids = logprobs_TV.topk(min(max(num_top), logprobs_TV.shape[1]), dim=-1)
    return [
        TokenLogprobs(
            logprob=lp, top=sorted(zip(i, v, strict=True), key=lambda e: (-e[1], e[0]))[:n]
        )
        for lp, i, v, n in zip(chosen, ids.tolist(), values.tolist(), num_top, strict=True)
    ]


def _edited(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """A copy with penalties and min_tokens applied, or the same tensor where no row asks."""
    indices = [i for i, row in enumerate(rows) if row.edits_logits]
    if not indices:
        return logits_BV
    edited_BV = logits_BV.clone()
    for i in indices:
        biased_V = _bias(logits_BV[i], rows[i].params.logit_bias)
        edited_BV[i] = _suppress_ends(_penalise(biased_V, rows[i]), rows[i])
    return edited_BV


def _bias(logits_V: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    if not bias:
        return logits_V
    ids, values = zip(*bias, strict=True)
    like = {"device": logits_V.device}
    added = torch.tensor(values, dtype=logits_V.dtype, **like)
    return logits_V.index_add(0, torch.tensor(ids, dtype=torch.long, **like), added)


def _penalise(logits_V: Tensor, row: SamplingRow) -> Tensor:
    """Repetition penalty for tokens of prompt and output; the other two for output tokens."""
    p = row.params
    counts_V = _counts(row.output_ids, logits_V)
    if p.repetition_penalty != 1:
        seen_V = (counts_V > 0) | (_counts(row.prompt_ids, logits_V) > 0)
        factor = p.repetition_penalty
        penalised_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
        logits_V = torch.where(seen_V, penalised_V, logits_V)
    return logits_V - p.frequency_penalty * counts_V - p.presence_penalty * (counts_V > 0)


def _counts(ids: Sequence[int], like_V: Tensor) -> Tensor:
    listed = torch.tensor(ids, dtype=torch.long).bincount(minlength=like_V.shape[0])
    return listed.to(like_V.device)


def _suppress_ends(logits_V: Tensor, row: SamplingRow) -> Tensor:
    ends = (*row.params.eos_token_ids, *row.params.stop_token_ids)
    if len(row.output_ids) >= row.params.min_tokens or not ends:
        return logits_V
    return logits_V.index_fill(0, torch.tensor(ends, device=logits_V.device), -inf)


def _keep(scaled_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Minus infinity wherever min_p, top_k or top_p cut a token off (in place).

    Among equal logits the lower id ranks first. At least one token is always kept.
    """
    if any(p.min_p > 0 for p in params):
        probs_BV = scaled_BV.softmax(-1)
        floor_B1 = probs_BV.amax(-1, keepdim=True) * _column([p.min_p for p in params], scaled_BV)
        scaled_BV.masked_fill_(probs_BV < floor_B1, -inf)
    if not any(p.top_k > 0 or p.top_p < 1 for p in params):
        return scaled_BV
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_BV.shape[1], device=scaled_BV.device)
    sorted_BV.masked_fill_(rank_V >= _column([_top_k(p) for p in params], scaled_BV), -inf)
    if any(p.top_p < 1 for p in params):
        probs_BV = sorted_BV.softmax(-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        beyond_BV = before_BV >= _column([_top_p(p) for p in params], scaled_BV)
        sorted_BV.masked_fill_(beyond_BV & (rank_V > 0), -inf)
    return scaled_BV.scatter_(-1, order_BV, sorted_BV)


def _column(values: Sequence[float], like_BV: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like_BV.dtype, device=like_BV.device)[:, None]


def _top_k(params: SamplingParams) -> float:
    return params.top_k if params.top_k > 0 else inf


def _top_p(params: SamplingParams) -> float:
    """Infinite where nothing is to be cut: partial sums may round up to 1."""
    return params.top_p if params.top_p < 1 else inf


def _choose(edited_BV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    tokens: list[int] = edited_BV.argmax(-1).tolist()  # the lowest id among equals
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    for start in range(0, len(drawn), ROWS_AT_A_TIME):
        some = drawn[start : start + ROWS_AT_A_TIME]
        for i, token in zip(some, _draw(edited_BV[some], [rows[i] for i in some]), strict=True):
            tokens[i] = token
    return tokens


def _draw(edited_BV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    params = [row.params for row in rows]
    scaled_BV = edited_BV.double() / _column([p.temperature for p in params], edited_BV).double()
    cdf_BV = _keep(scaled_BV, params).softmax(-1).cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    draws = [uniform(r.params.seed, r.params.choice, len(r.output_ids)) for r in rows]
    # Below the total even after rounding: the last token kept must end the search.
    target_B1 = torch.minimum(_column(draws, cdf_BV) * total_B1, total_B1 * (1 - 2.0**-52))
    # With NaN logits no draw means anything; the clamp only keeps the id inside the vocabulary.
    last = cdf_BV.shape[1] - 1
    return torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].clamp(max=last).tolist()


def _sampled_logprobs(
    logits_BV: Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    wanted = [(i, n) for i, row in enumerate(rows) if (n := row.params.logprobs) is not None]
    if wanted:
        indices = [i for i, _ in wanted]
        ids, num_top = [tokens[i] for i in indices], [n for _, n in wanted]
        for i, entry in zip(indices, token_logprobs(logits_BV[indices], ids, num_top), strict=True):
            result[i] = entry
    return result
