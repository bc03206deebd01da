"""The official `openai` client against a real instance of two ranks."""

import asyncio
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.cases import Weights
from support.deployment import Deployment, deployed
from support.reference import reference_tokens

from revivemoe.bench import plain_http
from revivemoe.sampling_params import SamplingParams

MODEL = "tiny-moe"
MAX_LEN = 2048
PROMPT = "When a device fails"
PLAIN = {"ignore_eos": True}
GREEDY = SamplingParams(seed=0, temperature=0, max_tokens=12)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def server(qwen: Weights) -> Iterator[Deployment]:
    flags = ["--served-model-name", MODEL, "--max-model-len", str(MAX_LEN)]
    with deployed(qwen.dir, 2, *flags) as running:
        yield running


@pytest.fixture
def client(server: Deployment) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: Deployment, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30)


def refused(error: pytest.ExceptionInfo[openai.APIStatusError]) -> dict[str, str]:
    body = error.value.body
    assert isinstance(body, dict)
    assert body.keys() == {"message", "type", "param", "code"}
    return body


# ---- completions ----------------------------------------------------------------------------


def test_a_completion_is_what_transformers_says(client: openai.OpenAI, qwen: Weights) -> None:
    done = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=PLAIN
    )
    ids = qwen.tokenizer.encode(PROMPT)
    expected = reference_tokens(qwen.model, ids, GREEDY, MAX_LEN)
    (choice,) = done.choices
    assert choice.text == qwen.tokenizer.decode(expected, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert done.object == "text_completion"
    assert done.model == MODEL
    assert done.id.startswith("cmpl-")
    assert done.usage is not None
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 12)
    assert usage.total_tokens == len(ids) + 12


def test_a_streamed_completion_is_the_same(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 3, "extra_body": PLAIN}
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.usage for c in chunks if c.usage] == [whole.usage]
    assert len({c.id for c in chunks}) == 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [r for r in reasons if r] == ["length"]


def test_choices_differ_and_come_again(client: openai.OpenAI) -> None:
    asked = {
        "model": MODEL, "prompt": [PROMPT, "Another"], "n": 2, "seed": 5, "max_tokens": 12,
        "temperature": 1.0, "extra_body": PLAIN,
    }  # fmt: skip
    first, again = client.completions.create(**asked), client.completions.create(**asked)
    assert [c.index for c in first.choices] == [0, 1, 2, 3]
    texts = [c.text for c in first.choices]
    assert len(set(texts)) == 4
    assert [c.text for c in again.choices] == texts
    assert first.usage is not None
    assert first.usage.completion_tokens == 48


def test_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 3}
    whole = client.completions.create(**asked, extra_body=PLAIN)
    scored = whole.choices[0].logprobs
    assert scored is not None
    assert scored.tokens is not None
    assert scored.token_logprobs is not None
    assert scored.top_logprobs is not None
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == 5
    for logprob, top in zip(scored.token_logprobs, scored.top_logprobs, strict=True):
        assert logprob == max(top.values()), "greedy takes the likeliest"
        assert sorted(top.values(), reverse=True) == list(top.values())
    chunks = client.completions.create(**asked, extra_body=PLAIN, stream=True)
    streamed = [lp for c in chunks if (found := c.choices[0].logprobs) for lp in found.tokens or ()]
    assert streamed == scored.tokens


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, qwen: Weights) -> None:
    done = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, echo=True, logprobs=1, extra_body=PLAIN
    )
    (choice,) = done.choices
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(qwen.tokenizer.encode(PROMPT)) + 3
    assert choice.logprobs.token_logprobs[0] is None
    assert all(lp < 0 for lp in choice.logprobs.token_logprobs[1:])


def test_a_stop_string_ends_it(client: openai.OpenAI) -> None:
    asked = {
        "model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "extra_body": PLAIN
    }  # fmt: skip
    free = client.completions.create(**asked).choices[0].text
    stop = free[6:9]
    for stream in (False, True):
        got = client.completions.create(**asked, stop=[stop], stream=stream)
        chunks = list(got) if stream else [got]
        text = "".join(c.choices[0].text for c in chunks)
        assert text == free[: free.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


# ---- chat -----------------------------------------------------------------------------------


def test_a_chat(client: openai.OpenAI, qwen: Weights) -> None:
    done = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0, extra_body=PLAIN
    )
    ids = qwen.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    expected = reference_tokens(qwen.model, ids, GREEDY, MAX_LEN)
    message = done.choices[0].message
    assert message.role == "assistant"
    assert message.content == qwen.tokenizer.decode(expected, skip_special_tokens=True)
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(ids)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0, stream=True, extra_body=PLAIN
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_logprobs_and_choices(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, n=2, seed=1, logprobs=True, top_logprobs=2,
        extra_body=PLAIN,
    )  # fmt: skip
    assert len(done.choices) == 2
    for choice in done.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 4


def test_the_async_client_many_at_once(server: Deployment) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=20, seed=number, stream=True,
                    extra_body=PLAIN,
                )  # fmt: skip
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i % 8) for i in range(16)))

    texts = asyncio.run(run())
    assert texts[:8] == texts[8:], "equal seeds, equal texts, whichever rank it was"
    assert len(set(texts)) == 8


# ---- models, errors -------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_model_that_is_not_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=f"this server has `{MODEL}`") as error:
        client.completions.create(model="another", prompt=PROMPT)
    assert refused(error)["code"] == "model_not_found"


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match=f"length is {MAX_LEN} tokens.* has 2100 input tokens"
    ) as error:
        client.completions.create(model=MODEL, prompt=[7] * 2100)
    assert refused(error)["code"] == "context_length_exceeded"
    full = client.completions.create(
        model=MODEL, prompt=[7] * 2040, max_tokens=100, extra_body=PLAIN
    )
    assert (full.choices[0].finish_reason, full.usage.completion_tokens) == ("length", 8)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"n": 0}, {"max_tokens": -1}, {"best_of": 3}, {"prompt": []}]
)
def test_a_malformed_request(client: openai.OpenAI, wrong: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT} | wrong)  # type: ignore[call-overload]
    assert next(iter(wrong)) in refused(error)["message"]


def test_what_is_not_supported_is_refused(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool])


def test_errors_disturb_nobody(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "seed": 2, "extra_body": PLAIN}
    alone = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True)
    text = next(stream).choices[0].text
    for wrong in ([7] * 2100, [10**6]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=wrong)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == alone


# ---- operations -----------------------------------------------------------------------------


def test_a_disconnect_frees_everything(client: openai.OpenAI, server: Deployment) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1800, n=2, stream=True, extra_body=PLAIN
    )
    next(stream)
    server.await_status(lambda s: sum(e["running"] for e in s["engines"]) == 2)
    began = time.monotonic()
    stream.close()
    server.await_status(
        lambda s: not any(e["running"] or e["kv_blocks_used"] for e in s["engines"]), 5.0
    )
    assert time.monotonic() - began < 1.0, "it ran to its end"


def test_a_disconnect_while_waiting_for_the_body(server: Deployment) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1800, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        plain_http.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    began = time.monotonic()
    server.await_status(
        lambda s: not any(e["running"] or e["kv_blocks_used"] for e in s["engines"]), 5.0
    )
    assert time.monotonic() - began < 1.0, "it ran to its end"


def test_health_ready_metrics(client: openai.OpenAI, server: Deployment) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200

    def generated() -> float:
        text = server.get("/metrics").text
        families = {f.name: f for f in text_string_to_metric_families(text)}
        return families["revivemoe_generation_tokens"].samples[0].value

    before = generated()
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=7, extra_body=PLAIN)
    assert generated() - before == 7


def test_keys(qwen: Weights) -> None:
    flags = ["--api-key", "right", "--admin-api-key", "admin"]
    with deployed(qwen.dir, 1, *flags) as server:
        assert server.get("/health").status_code == 200
        for key in ("wrong", "admin"):
            with client_of(server, key) as client, pytest.raises(openai.AuthenticationError) as e:
                client.completions.create(model="qwen3_moe", prompt=PROMPT)
            assert refused(e)["type"] == "authentication_error"
        with client_of(server, "right") as client:
            done = client.completions.create(model="qwen3_moe", prompt=PROMPT, max_tokens=2)
            assert done.choices[0].text is not None
        whatif = {"instruction": "whatif", "params": {"ids": [0]}}
        path = f"{server.url}/v1/fault_tolerance/apply"
        for key, status in (("right", 401), ("admin", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert plain_http.post(path, json=whatif, headers=headers).status_code == status
