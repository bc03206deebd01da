"""Text, tokens and log-probabilities of a real server, through a kill too; its last words."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.cases import Case, Weights, plain_cases
from support.deployment import Deployment, deployed, kill
from support.fuzz import RIGHT, WRONG, fuzz

from revivemoe.bench import plain_http
from revivemoe.sampling_params import SamplingParams

MAX_LEN = 256
GREEDY = SamplingParams(seed=1, temperature=0.0, max_tokens=120)


@pytest.fixture(scope="module")
def server(qwen: Weights) -> Iterator[Deployment]:
    flags = ["--redundant-experts", "32", "--max-model-len", str(MAX_LEN)]
    with deployed(qwen.dir, 3, *flags, "--shutdown-timeout", "20") as running:
        yield running


@pytest.fixture(scope="module")
def case(qwen: Weights) -> Case:
    (only,) = plain_cases(qwen, GREEDY, 1, (24, 25))
    return only


def asked(case: Case, **fields: Any) -> dict[str, Any]:
    body = {
        "prompt": case.request.body["prompt"],
        "temperature": 0,
        "max_tokens": 120,
        "ignore_eos": True,
    }
    return {**body, "logprobs": 2, "echo": True, "return_token_ids": True, **fields}


def post(server: Deployment, **body: Any) -> dict[str, Any]:
    answer = plain_http.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return dict(choice)


def streamed(server: Deployment, body: dict[str, Any], during: Any) -> dict[str, list[Any]]:
    """Text, tokens, offsets and so on of all chunks; `during(n)` after the n-th."""
    found: dict[str, list[Any]] = {"text": []}
    with plain_http.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True},
                      timeout=60) as answer:  # fmt: skip
        for n, line in enumerate(one for one in answer.iter_lines() if one.startswith("data: {")):
            document = json.loads(line[6:])
            assert "error" not in document, document
            choice = document["choices"][0]
            found["text"].append(choice["text"])
            for name, values in (choice["logprobs"] or {}).items():
                found.setdefault(name, []).extend(values)
            during(n)
    return found


@pytest.mark.parametrize("stop", [[], ["zzzz", "never comes"]])
def test_a_kill_between_two_tokens_changes_no_token_and_no_offset(
    server: Deployment, case: Case, stop: list[str]
) -> None:
    whole = post(server, **asked(case, stop=stop))
    victims = {
        e["id"]: e["running"] for e in server.status()["engines"] if e["status"] == "healthy"
    }

    def during(n: int) -> None:
        if n == 20:
            running = {e["id"]: e["running"] for e in server.status()["engines"]}
            busiest = max(victims, key=lambda rank: running[rank])
            kill(server.pids()[busiest])

    chunks = streamed(server, asked(case, stop=stop), during)
    assert whole["token_ids"] == case.expected[0]
    scored = whole["logprobs"]
    assert "".join(chunks["text"]) == whole["text"] == "".join(chunks["tokens"])
    assert (chunks["tokens"], chunks["text_offset"]) == (scored["tokens"], scored["text_offset"])
    for token, offset in zip(chunks["tokens"], chunks["text_offset"], strict=True):
        assert whole["text"][offset : offset + len(token)] == token
    assert chunks["token_logprobs"][1:] == pytest.approx(scored["token_logprobs"][1:], abs=1e-3)
    server.await_idle()


def test_a_prompt_as_long_as_the_context_is_scored(server: Deployment, case: Case) -> None:
    prompt = (list(case.request.body["prompt"]) * MAX_LEN)[:MAX_LEN]
    scored = {"prompt": prompt, "echo": True, "logprobs": 1, "ignore_eos": True}
    for max_tokens in (0, 1, 50):
        choice = post(server, **scored, max_tokens=max_tokens)
        assert len(choice["logprobs"]["tokens"]) == MAX_LEN + bool(max_tokens)
        assert choice["finish_reason"] == "length"
    shorter = post(server, prompt=prompt[:-1], echo=True, logprobs=1, max_tokens=0)["logprobs"]
    assert len(shorter["tokens"]) == MAX_LEN - 1
    server.await_idle()


@pytest.mark.parametrize("mode", [RIGHT, WRONG], ids=["right", "wrong"])
def test_no_body_changes_a_neighbours_tokens(server: Deployment, case: Case, mode: Any) -> None:
    """Whatever the OpenAPI document allows or forbids, beside a stream."""
    pids, told = server.pids(), []
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(post, server, **asked(case))
        for label in ("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize"):
            told.append(fuzz(server.url, label, mode, 25, short))
        assert neighbour.result(60)["token_ids"] == case.expected[0]
    assert min(told) > 10
    assert server.pids() == pids, "and costs no rank"
    server.await_idle()


def short(body: Any) -> None:
    """Few tokens, unless it is said wrongly how many."""
    if isinstance(body.body, dict):
        for name, most in (("max_tokens", 3), ("n", 2), ("max_completion_tokens", 3)):
            if type(body.body.get(name, 99)) is int and body.body.get(name, 99) > most:
                body.body[name] = most


def test_streams_come_to_their_end_after_sigterm(server: Deployment, case: Case) -> None:
    """Last in this file: the server ends."""
    ready: list[int] = []

    def during(n: int) -> None:
        if n == 5:
            os.kill(server.pid, signal.SIGTERM)
            time.sleep(0.1)
            ready.append(server.get("/ready").status_code)

    chunks = streamed(server, asked(case), during)
    assert "".join(chunks["text"]) == "".join(chunks["tokens"])
    assert len(chunks["tokens"]) == len(case.request.body["prompt"]) + 120
    assert ready == [503]
    deadline = time.monotonic() + 10
    while _listens(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _listens(server: Deployment) -> bool:
    try:
        return server.get("/health").is_success
    except httpx.TransportError:
        return False
