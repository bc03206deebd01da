"""Prompts on which arithmetic noise cannot change the outcome.

Another batch shape or chunking moves router logits by ~1e-6. A prompt is kept only if no choice
along prompt and output is that close; on the prompts kept, equality is exact and never loosened.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from support import reference as reference_module
from support.margins import draw_margins
from support.reference import NOTHING, Masked, generate_batch, masked_experts
from torch import Tensor

from revivemoe.bench import routing
from revivemoe.bench.routing import LOGIT_MARGIN, ROUTER_GAP, observed_gaps
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.model import sampling
from revivemoe.model.sampling import SamplingRow, sample
from revivemoe.sampling_params import SamplingParams

DRAW_MARGIN = 1e-5
CUT_LOGIT_MARGIN = 1e-4
"""Gap between the logits on both sides of a top_k or min_p cut-off."""
MAX_REPAIRS = 200
BATCHES = 20

CACHE_DIR = Path(__file__).parents[2] / ".pytest_cache" / "d" / "screened-prompts"


class Screened(msgspec.Struct, frozen=True):
    """A prompt and the tokens that a correct server answers with."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Screening(msgspec.Struct, frozen=True):
    kept: list[Screened]
    tried: int
    passed: int
    """Of the candidates tried; `kept` is cut to the number asked for."""


def screen(
    model: Any,
    params: SamplingParams,
    count: int,
    *,
    prompt_lens: Sequence[int] = (24,),
    seed: int = 0,
    masked: Masked = NOTHING,
    max_model_len: int = 4096,
    cache_dir: Path | None = CACHE_DIR,
) -> list[Screened]:
    """`count` prompts of random tokens with wide margins everywhere; lengths in rotation."""
    screening = screening_of(
        model,
        params,
        count,
        prompt_lens=prompt_lens,
        seed=seed,
        masked=masked,
        max_model_len=max_model_len,
        cache_dir=cache_dir,
    )
    return screening.kept


def screening_of(
    model: Any,
    params: SamplingParams,
    count: int,
    *,
    prompt_lens: Sequence[int] = (24,),
    seed: int = 0,
    masked: Masked = NOTHING,
    max_model_len: int = 4096,
    cache_dir: Path | None = CACHE_DIR,
) -> Screening:
    """As `screen`, with the number of candidates tried and passed."""
    layers = sorted((layer, sorted(experts)) for layer, experts in masked.items())
    asked = (params, count, list(prompt_lens), seed, layers, max_model_len)
    path = cache_dir / _key(model, asked) if cache_dir else None
    if path and path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Screening)
    with torch.inference_mode(), masked_experts(model, masked):
        screening = _screen(model, params, count, prompt_lens, seed, masked, max_model_len)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(screening))
    return screening


def _screen(
    model: Any,
    params: SamplingParams,
    count: int,
    prompt_lens: Sequence[int],
    seed: int,
    masked: Masked,
    max_model_len: int,
) -> Screening:
    rng = random.Random(seed)
    wanted = Counter(prompt_lens[i % len(prompt_lens)] for i in range(count))
    kept: dict[int, list[Screened]] = {}
    tried = passed = 0
    for length, needed in wanted.items():
        found: list[Screened] = []
        for _ in range(BATCHES):
            if len(found) >= needed:
                break
            size = min(max(2, (needed - len(found)) * 5 // 4), max(1, 6000 // length))
            good = _candidates(model, params, size, length, rng, masked, max_model_len)
            tried, passed = tried + size, passed + len(good)
            found += good
        if len(found) < needed:
            raise ValueError(
                f"only {len(found)} of {needed} prompts of {length} tokens had wide margins: "
                "ask for fewer output tokens or use another model seed"
            )
        kept[length] = found
    rotation = [kept[prompt_lens[i % len(prompt_lens)]].pop(0) for i in range(count)]
    return Screening(kept=rotation, tried=tried, passed=passed)


def _candidates(
    model: Any,
    params: SamplingParams,
    size: int,
    length: int,
    rng: random.Random,
    masked: Masked,
    max_model_len: int,
) -> list[Screened]:
    prompts = _repaired_prompts(model, size, length, rng, masked)
    answers = generate_batch(model, prompts, params, max_model_len)
    return [
        Screened(prompt_ids=prompt, output_ids=answer.token_ids, logprobs=answer.logprobs)
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_safe(model, prompt, answer.token_ids, params, masked)
    ]


def _repaired_prompts(
    model: Any, size: int, length: int, rng: random.Random, masked: Masked
) -> list[list[int]]:
    """Random prompts; the first token with a narrow router gap is replaced until there is none."""
    vocab = range(_first_ordinary_token(model), model.config.vocab_size)
    prompts = [[rng.choice(vocab) for _ in range(length)] for _ in range(size)]
    open_rows = list(range(size))
    for _ in range(MAX_REPAIRS):
        if not open_rows:
            break
        with observed_gaps(model, masked) as gaps:
            model(input_ids=torch.tensor([prompts[i] for i in open_rows]), logits_to_keep=1)
        narrow = (gaps.smallest() < ROUTER_GAP).view(len(open_rows), length)
        for i, row in zip(open_rows, narrow, strict=True):
            if row.any():
                prompts[i][int(row.int().argmax())] = rng.choice(vocab)
        open_rows = [i for i, row in zip(open_rows, narrow, strict=True) if row.any()]
    return prompts


def _first_ordinary_token(model: Any) -> int:
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = [t for t in (*ends, config.bos_token_id, config.pad_token_id) if t is not None]
    return max(special, default=-1) + 1


@torch.inference_mode()
def is_safe(
    model: Any,
    prompt_ids: list[int],
    output_ids: list[int],
    params: SamplingParams,
    masked: Masked = NOTHING,
) -> bool:
    """Every choice along the way is wide, by one forward over the whole sequence.

    Also checks that this forward, chunked unlike the generation, chooses the same tokens.
    """
    with masked_experts(model, masked), observed_gaps(model, masked) as gaps:
        logits_TV = model(input_ids=torch.tensor([prompt_ids + output_ids])).logits[0]
    if float(gaps.smallest()[:-1].min()) < ROUTER_GAP:  # the last token's output goes nowhere
        return False
    logits_TV = logits_TV[len(prompt_ids) - 1 : -1]
    rows = [SamplingRow(params, prompt_ids, output_ids[:i]) for i in range(len(output_ids))]
    if [token.token_id for token in sample(logits_TV, rows)] != output_ids:
        return False
    return all(_wide(logits_V, row) for logits_V, row in zip(logits_TV, rows, strict=True))


def _wide(logits_V: Tensor, row: SamplingRow) -> bool:
    margins = draw_margins(logits_V, row)
    logit_margin = LOGIT_MARGIN if row.greedy else CUT_LOGIT_MARGIN
    return margins.logit >= logit_margin and margins.probability >= DRAW_MARGIN


# ---- cache ----------------------------------------------------------------------------------


def _key(model: Any, asked: Any) -> str:
    """Changes with the weights, the request, the libraries and the code that decides."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(msgspec.json.encode(asked))
    digest.update(f"{torch.__version__} {model.config.to_json_string()}".encode())
    for source in (__file__, reference_module.__file__, routing.__file__, sampling.__file__):
        digest.update(Path(source).read_bytes())
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
