"""Screened requests of every kind, each with the tokens that `transformers` answers with."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from support.client import Answer, Request
from support.reference import reference
from support.screen import is_safe, screen

from revivemoe.sampling_params import SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_MODEL_LEN = 4096
OUTPUT_TOKENS = 48


@dataclass(frozen=True)
class Case:
    """One request; `expected[i]`: the token ids of choice i."""

    name: str
    request: Request
    expected: list[list[int]]

    def check(self, answer: Answer) -> list[str]:
        """What is wrong with an answer."""
        if answer.error is not None:
            return [f"{self.name}: {answer.error}"]
        if answer.tokens != self.expected:
            return [f"{self.name}: {answer.tokens}, not {self.expected}"]
        reasons = {choice.finish_reason for choice in answer.choices.values()}
        wanted = {"stop" if "stop" in self.name else "length"}
        return [] if reasons == wanted else [f"{self.name}: finish reasons {reasons}"]


class Weights:
    """A checkpoint on disk beside the same model in `transformers`."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.dir = model_dir
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)


def body_of(params: SamplingParams) -> dict[str, Any]:
    """The fields that ask for these parameters; end-of-sequence tokens are ignored."""
    assert not params.eos_token_ids
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "seed": params.seed,
        "max_tokens": params.max_tokens,
        "ignore_eos": True,
    }


def plain_cases(
    weights: Weights,
    params: SamplingParams,
    count: int,
    prompt_lens: Sequence[int],
    name: str = "plain",
    seed: int = 0,
) -> list[Case]:
    """Prompts of token ids, one choice each."""
    return [
        Case(
            f"{name} {i}",
            Request(COMPLETIONS, {**body_of(params), "prompt": s.prompt_ids}),
            [s.output_ids],
        )
        for i, s in enumerate(
            screen(weights.model, params, count, prompt_lens=prompt_lens, seed=seed)
        )
    ]


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_p": {"temperature": 0.9, "top_p": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 30},
    "min_p": {"temperature": 0.8, "min_p": 0.02},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.3},
    "presence": {"temperature": 0.9, "presence_penalty": 0.9},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.7},
}


def mixed_cases(weights: Weights) -> list[Case]:
    """Every way of asking, once."""
    cases = [
        case
        for k, (name, fields) in enumerate(SAMPLING.items())
        for case in plain_cases(
            weights,
            SamplingParams(seed=k, max_tokens=OUTPUT_TOKENS, **fields),
            1,
            (9 + 13 * k,),
            name,
            seed=k,
        )
    ]
    return [
        *cases,
        _shared_prefix(cases[0]),
        _two_choices(weights),
        _logprobs(weights, echo=False),
        _logprobs(weights, echo=True),
        _stop_string(weights),
        _stop_token(weights),
        _text_prompt(weights),
        *_chats(weights),
    ]


def _shared_prefix(case: Case) -> Case:
    """The same prompt twice: the second may find its blocks in the prefix cache."""
    return Case("greedy again", case.request, case.expected)


def _two_choices(weights: Weights) -> Case:
    params = SamplingParams(seed=11, temperature=0.9, max_tokens=OUTPUT_TOKENS)
    prompts = (s.prompt_ids for s in screen(weights.model, params, 6, seed=11))
    prompt, outputs = _first_safe(weights, params, 2, prompts)
    body = {**body_of(params), "prompt": prompt, "n": 2}
    return Case("two choices", Request(COMPLETIONS, body), outputs)


def _logprobs(weights: Weights, echo: bool) -> Case:
    params = SamplingParams(seed=12, temperature=0.9, max_tokens=OUTPUT_TOKENS)
    name = "echo" if echo else "logprobs"
    (case,) = plain_cases(weights, params, 1, (70 if echo else 33,), name, seed=12)
    body = {**case.request.body, "logprobs": 2, "echo": echo}
    return Case(name, Request(COMPLETIONS, body), case.expected)


def _stop_string(weights: Weights) -> Case:
    """Ends on text that its own output reaches after some two thirds."""
    params = SamplingParams(seed=13, temperature=0.0, max_tokens=OUTPUT_TOKENS)
    for case in plain_cases(weights, params, 6, (20,), "stop string", seed=13):
        (output,) = case.expected
        stop = _late_text(weights.tokenizer, output)
        if stop is not None:
            body = {**case.request.body, "stop": [stop]}
            return Case(case.name, Request(COMPLETIONS, body), [_until(weights, output, stop)])
    raise AssertionError("no output has readable text in its last third")


def _late_text(tokenizer: Any, output: list[int]) -> str | None:
    """Text of two neighbouring tokens that does not occur before."""
    for k in range(2 * len(output) // 3, len(output) - 2):
        text = tokenizer.decode(output[k : k + 2])
        if len(text) >= 2 and text.isascii() and text not in tokenizer.decode(output[:k]):
            return str(text)
    return None


def _until(weights: Weights, output: list[int], stop: str) -> list[int]:
    """The shortest beginning of an output whose text holds the stop string."""
    ends = range(1, len(output) + 1)
    end = next(k for k in ends if stop in weights.tokenizer.decode(output[:k]))
    return output[:end]


def _stop_token(weights: Weights) -> Case:
    params = SamplingParams(seed=14, temperature=0.9, max_tokens=OUTPUT_TOKENS)
    (case,) = plain_cases(weights, params, 1, (28,), "stop token", seed=14)
    (output,) = case.expected
    stop = output[2 * len(output) // 3]
    body = {**case.request.body, "stop_token_ids": [stop]}
    return Case(case.name, Request(COMPLETIONS, body), [output[: output.index(stop) + 1]])


def _text_prompt(weights: Weights) -> Case:
    params = SamplingParams(seed=15, temperature=0.9, max_tokens=OUTPUT_TOKENS)
    texts = {tuple(weights.tokenizer.encode(text)): text for text in _texts(15)}
    prompt, outputs = _first_safe(weights, params, 1, map(list, texts))
    body = {**body_of(params), "prompt": texts[tuple(prompt)]}
    return Case("text", Request(COMPLETIONS, body), outputs)


def _chats(weights: Weights) -> Iterator[Case]:
    kinds: list[tuple[int, int, dict[str, Any]]] = [
        (16, 1, {"logprobs": True, "top_logprobs": 2}),
        (17, 2, {}),
    ]
    for seed, n, fields in kinds:
        params = SamplingParams(seed=seed, temperature=0.9, max_tokens=OUTPUT_TOKENS)
        chats = {
            tuple(_rendered(weights.tokenizer, messages)): messages
            for text in _texts(seed)
            for messages in [[{"role": "user", "content": text}]]
        }
        prompt, outputs = _first_safe(weights, params, n, map(list, chats))
        body = {**body_of(params), "messages": chats[tuple(prompt)], "n": n, **fields}
        yield Case(f"chat n={n}", Request(CHAT, body), outputs)


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ("rank", "expert", "router", "token", "block", "epoch", "stream", "prefix", "cache")
    return [" ".join(draw.choices(words, k=12)) for _ in range(30)]


def _first_safe(
    weights: Weights, params: SamplingParams, n: int, prompts: Iterable[list[int]]
) -> tuple[list[int], list[list[int]]]:
    """The first prompt of which all `n` choices have wide margins, with their outputs."""
    model = weights.model
    for prompt in prompts:
        asked = [msgspec.structs.replace(params, choice=choice) for choice in range(n)]
        outputs = [reference(model, prompt, p, MAX_MODEL_LEN).token_ids for p in asked]
        if all(is_safe(model, prompt, o, p) for p, o in zip(asked, outputs, strict=True)):
            return prompt, outputs
    raise AssertionError("no prompt has wide margins: try another seed")


def check_all(cases: Sequence[Case], answers: Sequence[Answer]) -> list[str]:
    """What is wrong with the answers to these cases."""
    return [w for case, answer in zip(cases, answers, strict=True) for w in case.check(answer)]


def requests_of(cases: Sequence[Case]) -> list[Request]:
    return [case.request for case in cases]
