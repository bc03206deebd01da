"""The sampler against a naive one in plain Python, and its promises as properties."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.margins import draw_margins

from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.model.sampling import SampledToken, SamplingRow, sample, token_logprobs, uniform
from revivemoe.sampling_params import SamplingParams

VOCAB = 24


def row(
    prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **params: Any
) -> SamplingRow:
    return SamplingRow(SamplingParams(**({"seed": 0} | params)), prompt, output)


def random_logits(seed: int, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def tokens(drawn: list[SampledToken]) -> list[int]:
    return [d.token_id for d in drawn]


# ---- the naive sampler ----------------------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def naive_edited(logits: list[float], r: SamplingRow) -> list[float]:
    p, edited = r.params, []
    for token, x in enumerate(logits):
        x += dict(p.logit_bias).get(token, 0.0)
        count = list(r.output_ids).count(token)
        if count or token in r.prompt_ids:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        x -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        is_end = token in p.eos_token_ids or token in p.stop_token_ids
        edited.append(-math.inf if is_end and len(r.output_ids) < p.min_tokens else x)
    return edited


def naive_kept(logits: list[float], p: SamplingParams) -> list[int]:
    """Token ids that survive min_p, then top_k, then top_p."""
    probs = softmax(logits)
    kept = [t for t, q in enumerate(probs) if q >= p.min_p * max(probs) and q > 0]
    kept.sort(key=lambda t: (-logits[t], t))
    kept = kept[: p.top_k] if p.top_k > 0 else kept
    if p.top_p < 1:
        probs = softmax([logits[t] for t in kept])
        kept = [t for i, t in enumerate(kept) if i == 0 or math.fsum(probs[:i]) < p.top_p]
    return sorted(kept)


def naive_sample(logits: list[float], r: SamplingRow) -> int:
    logits = naive_edited(logits, r)
    if r.params.temperature == 0:
        return logits.index(max(logits))
    logits = [x / r.params.temperature for x in logits]
    kept = naive_kept(logits, r.params)
    probs = softmax([logits[t] for t in kept])
    u = uniform(r.params.seed, r.params.choice, len(r.output_ids))
    return next(
        (t for i, t in enumerate(kept) if math.fsum(probs[: i + 1]) > u),
        kept[-1],
    )


params_strategy = st.builds(
    SamplingParams,
    seed=st.integers(-(2**70), 2**70),
    choice=st.integers(0, 8),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.0, 0.05, 0.5, 0.9]),
    top_k=st.sampled_from([0, 1, 2, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.6]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.sampled_from([(), ((3, 100.0),), ((2, -100.0), (7, 1.5))]),
    min_tokens=st.sampled_from([0, 3]),
    eos_token_ids=st.just((2, 4)),
    stop_token_ids=st.sampled_from([(), (5,)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
ids_strategy = st.lists(st.integers(0, VOCAB - 1), max_size=12)
row_strategy = st.builds(
    SamplingRow, params=params_strategy, prompt_ids=ids_strategy, output_ids=ids_strategy
)


@settings(max_examples=300, deadline=None)
@given(r=row_strategy, seed=st.integers(0, 2**32))
def test_equals_the_naive_sampler(r: SamplingRow, seed: int) -> None:
    logits = random_logits(seed, 1)
    if draw_margins(logits[0], r).logit > 1e-4:  # the naive one computes in other precision
        assert tokens(sample(logits, [r])) == [naive_sample(logits[0].tolist(), r)]


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_rows_do_not_depend_on_their_batch(rows: list[SamplingRow], seed: int) -> None:
    logits = random_logits(seed, len(rows))
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    assert tokens(together) == tokens(alone)
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    assert tokens(together) == tokens(backwards)
    for one, other in zip(together, alone, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)


def test_more_rows_than_are_drawn_at_a_time() -> None:
    logits = random_logits(0, 100)
    rows = [row(seed=i, temperature=1.0, top_p=0.9) for i in range(100)]
    expected = [naive_sample(x.tolist(), r) for x, r in zip(logits, rows, strict=True)]
    assert tokens(sample(logits, rows)) == expected


def test_input_is_left_as_it_was() -> None:
    logits = random_logits(0, 2)
    before = logits.clone()
    sample(logits, [row(temperature=0, repetition_penalty=2.0), row(top_k=3, min_p=0.1)])
    assert torch.equal(logits, before)


# ---- draws ----------------------------------------------------------------------------------


def test_uniform_numbers_never_change() -> None:
    """A sequence may migrate to a rank of another version: these values are a contract."""
    assert uniform(0, 0, 0) == 0.9806404073469595
    assert uniform(7, 1, 42) == 0.3586622690005148
    assert uniform(-1, 0, 10**6) == 0.33032589253496925


def test_uniform_numbers_are_uniform_and_distinct() -> None:
    draws = [uniform(s, c, p) for s in range(20) for c in range(3) for p in range(200)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    buckets = [sum(int(u * 10) == b for u in draws) for b in range(10)]
    assert sum((n - 1200) ** 2 / 1200 for n in buckets) < 27.9  # chi-square, 9 degrees, p = 0.001


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.8, "min_p": 0.05}]
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    count, logits = 4000, random_logits(5, 1, vocab=12)
    p = SamplingParams(seed=0, **params)
    scaled = [x / p.temperature for x in logits[0].tolist()]
    kept = naive_kept(scaled, p)
    probs = dict(zip(kept, softmax([scaled[t] for t in kept]), strict=True))
    rows = [row(seed=s, **params) for s in range(count)]
    drawn = tokens(sample(logits.expand(count, -1), rows))
    assert set(drawn) <= set(kept)
    chi_square = sum((drawn.count(t) - count * q) ** 2 / (count * q) for t, q in probs.items())
    assert chi_square < 31.3  # 11 degrees of freedom at most, p = 0.001


def test_seed_choice_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 1000)
    draws = [
        tokens(sample(logits, [row(seed=s, choice=c, output=(0,) * n)]))[0]
        for s in (0, 1)
        for c in (0, 1)
        for n in (0, 1)
    ]
    assert len(set(draws)) == 8


def test_the_draw_is_in_vocabulary_order() -> None:
    drawn = tokens(sample(torch.zeros(50, 1000), [row(seed=s) for s in range(50)]))
    assert drawn == [int(uniform(s, 0, 0) * 1000) for s in range(50)]


# ---- each parameter by hand -----------------------------------------------------------------


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def support(logits: torch.Tensor, **params: Any) -> set[int]:
    rows = [row(seed=s, **params) for s in range(300)]
    return set(tokens(sample(logits.expand(300, -1), rows)))


def test_cut_offs_apply_in_order() -> None:
    probs = logits_of(0.1, 0.4, 0.2, 0.3)
    assert support(probs) == {0, 1, 2, 3}
    assert support(probs, top_k=2) == {1, 3}
    assert support(probs, top_p=0.65) == {1, 3}
    assert support(probs, top_k=2, top_p=0.55) == {1}  # 0.4 of 0.7 is 0.57 already
    assert support(probs, min_p=0.6) == {1, 3}
    assert support(probs, min_p=0.4, top_p=0.75) == {1, 3}  # 0.7 of 0.9 is 0.78
    assert support(probs, min_p=1.0) == {1}
    assert support(probs, top_p=0.0001) == {1}


def test_equal_logits_rank_by_id() -> None:
    assert support(torch.zeros(1, 6), top_k=2) == {0, 1}
    assert tokens(sample(torch.zeros(1, 6), [row(temperature=0)])) == [0]


def test_temperature_comes_before_the_cut_offs() -> None:
    probs = logits_of(0.6, 0.3, 0.1)
    assert support(probs, top_p=0.7) == {0, 1}
    assert support(probs, top_p=0.7, temperature=0.3) == {0}
    assert support(probs, min_p=0.2, temperature=5.0) == {0, 1, 2}


def test_extreme_temperatures() -> None:
    logits = random_logits(1, 1)
    assert tokens(sample(logits, [row(temperature=1e-9)])) == [int(logits.argmax())]
    assert support(logits, temperature=1e-4) == {int(logits.argmax())}
    assert len(support(logits, temperature=1e6)) == VOCAB


def test_penalties() -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, -1.0]])
    greedy = {"temperature": 0}
    assert tokens(sample(logits, [row(prompt=(0,), **greedy, repetition_penalty=1.5)])) == [1]
    assert tokens(sample(logits, [row(prompt=(0,), **greedy, presence_penalty=2.0)])) == [0]
    output = {"prompt": (), "output": (0, 1, 0), **greedy}
    assert tokens(sample(logits, [row(**output, presence_penalty=0.6)])) == [0]
    assert tokens(sample(logits, [row(**output, presence_penalty=1.1)])) == [2]
    assert tokens(sample(logits, [row(**output, frequency_penalty=0.4)])) == [0]
    assert tokens(sample(logits, [row(**output, frequency_penalty=0.45)])) == [0]
    assert tokens(sample(logits, [row(**output, frequency_penalty=0.55)])) == [2]


def test_ends_wait_for_min_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    ends: dict[str, Any] = {"eos_token_ids": (0,), "stop_token_ids": (1,), "temperature": 0}
    assert tokens(sample(logits, [row(**ends, min_tokens=2)])) == [2]
    assert tokens(sample(logits, [row(**ends, min_tokens=2, output=(2,))])) == [2]
    assert tokens(sample(logits, [row(**ends, min_tokens=2, output=(2, 2))])) == [0]
    assert tokens(sample(logits, [row(temperature=0, min_tokens=2)])) == [0]


def test_bfloat16_logits_and_no_rows() -> None:
    logits = random_logits(2, 1).bfloat16()
    assert tokens(sample(logits, [row(temperature=0)])) == [int(logits.float().argmax())]
    assert sample(torch.empty(0, VOCAB), []) == []


# ---- log-probabilities ----------------------------------------------------------------------


def naive_logprobs(logits: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    logs = [math.log(q) for q in softmax(logits.tolist())]
    ranked = sorted(enumerate(logs), key=lambda entry: -entry[1])
    return TokenLogprobs(logprob=logs[token], top=ranked[:top])


def assert_close(got: TokenLogprobs | None, expected: TokenLogprobs) -> None:
    assert got is not None
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [t for t, _ in got.top] == [t for t, _ in expected.top]
    assert [x for _, x in got.top] == pytest.approx([x for _, x in expected.top], abs=1e-5)


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3, 4)
    edits: dict[str, Any] = {"temperature": 0.2, "repetition_penalty": 3.0, "top_k": 3}
    counts = [2, None, 0, 5]
    rows = [row(seed=i, logprobs=n, **edits) for i, n in enumerate(counts)]
    for x, n, drawn in zip(logits, counts, sample(logits, rows), strict=True):
        if n is None:
            assert drawn.logprobs is None
        else:
            assert_close(drawn.logprobs, naive_logprobs(x, drawn.token_id, n))


def test_prompt_logprobs() -> None:
    logits = random_logits(4, 3)
    got = token_logprobs(logits, [7, 0, 23], [1, 0, 100])
    for x, token, top, entry in zip(logits, [7, 0, 23], [1, 0, 100], got, strict=True):
        assert_close(entry, naive_logprobs(x, token, top))
    assert token_logprobs(torch.empty(0, VOCAB), [], []) == []


# ---- margins --------------------------------------------------------------------------------


def test_greedy_margin_is_that_of_the_edited_logits() -> None:
    logits = torch.tensor([2.0, 1.5, 0.0])
    assert draw_margins(logits, row(temperature=0)).logit == pytest.approx(0.5)
    penalised = row(prompt=(0,), temperature=0, repetition_penalty=2.0)
    assert draw_margins(logits, penalised).logit == pytest.approx(0.5)  # 1.5 against 1.0


def test_draw_margin_is_the_distance_from_the_interval_ends() -> None:
    u = uniform(0, 0, 0)
    for boundary in (u - 0.02, u + 0.01):
        margins = draw_margins(logits_of(boundary, 1 - boundary)[0], row())
        assert margins.probability == pytest.approx(abs(u - boundary), abs=1e-6)
        assert margins.logit == math.inf


def test_cut_off_margins() -> None:
    logits = logits_of(0.4, 0.3, 0.2, 0.1)[0]
    assert draw_margins(logits, row(top_k=1)).logit == pytest.approx(math.log(0.4 / 0.3), abs=1e-6)
    assert draw_margins(logits, row(min_p=0.5)).logit == pytest.approx(0, abs=1e-6)
    assert draw_margins(logits, row(top_p=0.701)).probability <= 0.00101


@settings(max_examples=200, deadline=None)
@given(r=row_strategy, seed=st.integers(0, 2**32), noise_seed=st.integers(0, 2**32))
def test_noise_below_the_margins_changes_nothing(
    r: SamplingRow, seed: int, noise_seed: int
) -> None:
    logits = random_logits(seed, 1)
    margins = draw_margins(logits[0], r)
    noisy = logits + 1e-6 * torch.tanh(random_logits(noise_seed, 1))
    if margins.logit >= 1e-4 and margins.probability >= 1e-5:
        assert tokens(sample(noisy, [r])) == tokens(sample(logits, [r]))
