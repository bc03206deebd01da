import json

import openai
import pytest


def words(tokenizer, text):
    return lambda prompt, choice: tokenizer.encode(text)


def stream_text(chunks) -> str:
    return "".join(c.choices[0].text for c in chunks if c.choices)


def test_a_completion(client, engine, tokenizer):
    engine.script = words(tokenizer, "hello world<|im_end|>")
    done = client.completions.create(model="tiny", prompt="hello", max_tokens=10)
    assert done.object == "text_completion"
    assert done.choices[0].text == "hello world"
    assert done.choices[0].finish_reason == "stop"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (1, 3)
    assert done.usage.total_tokens == 4
    assert "quality" not in done.model_extra


def test_a_stream_says_the_same_as_the_body(client, engine, tokenizer):
    engine.script = words(tokenizer, "hé€llo world!")
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 20}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert stream_text(chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()
    assert all(c.usage is None for c in chunks[:-1])


def test_defaults_reach_the_engine(client, engine, tokenizer):
    client.completions.create(model="tiny", prompt="ab")
    (submission,) = engine.submissions
    params = submission.params
    assert (params.max_tokens, params.temperature, params.top_k) == (16, 1.0, 0)
    assert params.eos_token_ids == (tokenizer.eos_token_id,)
    assert params.logprobs is None
    assert 0 <= params.seed < 1 << 63


def test_unseeded_requests_differ_and_seeded_ones_do_not(client, engine):
    for seed in (None, None, 7, 7):
        client.completions.create(model="tiny", prompt="ab", seed=seed)
    a, b, c, d = (s.params.seed for s in engine.submissions)
    assert a != b
    assert c == d == 7


def test_every_parameter_reaches_the_engine(client, engine):
    client.completions.create(
        model="tiny",
        prompt="ab",
        n=2,
        seed=-1,
        temperature=0,
        top_p=0.5,
        max_tokens=9,
        stop="xyz",
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logprobs=0,
        extra_body={
            "top_k": -1,
            "min_p": 0.25,
            "min_tokens": 4,
            "stop_token_ids": [3],
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "include_stop_str_in_output": True,
        },
    )
    (submission,) = engine.submissions
    params = submission.params
    assert submission.n == 2
    assert (submission.stop.strings, submission.stop.include_in_output) == (("xyz",), True)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 0, 0.25)
    assert (params.max_tokens, params.min_tokens) == (9, 4)
    assert (params.stop_token_ids, params.eos_token_ids) == ((3,), ())
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, -0.2)
    assert (params.repetition_penalty, params.logprobs) == (1.5, 0)
    assert params.seed == (1 << 63) - 1


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("hello", "ids"),
        (["a", "b"], "ids"),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_forms_of_prompt(client, engine, tokenizer, prompt, want):
    done = client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    if want == "ids":
        want = [tokenizer.encode(p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
    assert [list(p) for p in engine.submissions[0].prompts] == want
    assert [c.index for c in done.choices] == list(range(len(want)))
    assert done.usage.prompt_tokens == sum(map(len, want))


def test_n_choices_of_several_prompts_are_in_order(client, engine, tokenizer):
    engine.script = lambda prompt, choice: [prompt[0], tokenizer.encode("xyz")[choice]]
    asked = {"model": "tiny", "prompt": ["a", "b"], "n": 3, "max_tokens": 2}
    done = client.completions.create(**asked)
    assert [c.text for c in done.choices] == ["ax", "ay", "az", "bx", "by", "bz"]
    texts = dict.fromkeys(range(6), "")
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == ["ax", "ay", "az", "bx", "by", "bz"]


def test_stop_strings_across_tokens(client, engine, tokenizer):
    engine.script = words(tokenizer, "hello world, hello")
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 9, "stop": ["lo wo", "never"]}
    done = client.completions.create(**asked)
    assert done.choices[0].text == "hel"
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].stop_reason == "lo wo"
    assert done.usage.completion_tokens == 2
    assert stream_text(client.completions.create(**asked, stream=True)) == "hel"


def test_logprobs(client, engine, tokenizer):
    engine.script = words(tokenizer, "abc")
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 3, "logprobs": 2}
    logprobs = client.completions.create(**asked).choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[1] == {"b": -0.5, "a": -1.5}
    chunks = list(client.completions.create(**asked, stream=True))
    assert [c.choices[0].logprobs.text_offset for c in chunks] == [[0], [1], [2]]


def test_echo(client, engine, tokenizer):
    engine.script = words(tokenizer, "xyz")
    asked = {"model": "tiny", "prompt": "ab<|im_end|>", "max_tokens": 2, "echo": True}
    assert client.completions.create(**asked).choices[0].text == "ab<|im_end|>xy"
    assert stream_text(client.completions.create(**asked, stream=True)) == "ab<|im_end|>xy"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client, engine, tokenizer, stream):
    engine.script = words(tokenizer, "xyz")
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 1, "echo": True, "logprobs": 1}
    done = client.completions.create(**asked, stream=stream)
    choice = next(iter(done)).choices[0] if stream else done.choices[0]
    assert engine.submissions[0].params.prompt_logprobs == 1
    assert choice.text == "abx"
    assert choice.logprobs.tokens == ["a", "b", "x"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert choice.logprobs.top_logprobs == [None, {"b": -0.5}, {"x": -0.5}]
    assert choice.logprobs.text_offset == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_scores_the_prompt(client, stream):
    done = client.completions.create(
        model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=1, stream=stream
    )
    choice = next(iter(done)).choices[0] if stream else done.choices[0]
    assert choice.text == "abc"
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.finish_reason == "length"
    assert stream or done.usage.completion_tokens == 0


def test_echo_of_a_prompt_of_one_token(client):
    done = client.completions.create(model="tiny", prompt="a", max_tokens=0, echo=True, logprobs=1)
    assert done.choices[0].logprobs.token_logprobs == [None]


def test_token_ids_are_returned_while_text_is_held(client, engine, tokenizer):
    ids = tokenizer.encode("abc€")
    engine.script = lambda prompt, choice: ids
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": len(ids), "stop": ["bcd"]}
    extra = {"extra_body": {"return_token_ids": True}}
    done = client.completions.create(**asked, **extra)
    assert done.choices[0].token_ids == ids
    assert done.choices[0].prompt_token_ids == tokenizer.encode("ab")
    chunks = list(client.completions.create(**asked, **extra, stream=True))
    assert [c.choices[0].token_ids for c in chunks] == [[i] for i in ids]
    assert [c.choices[0].text for c in chunks[:3]] == ["a", "", ""]
    assert stream_text(chunks) == "abc€"
    assert chunks[0].choices[0].prompt_token_ids == tokenizer.encode("ab")
    assert not hasattr(chunks[1].choices[0], "prompt_token_ids")


def test_the_stream_is_plain_server_sent_events(http, engine, tokenizer):
    engine.script = words(tokenizer, "a\u2028b")
    body = {"prompt": "x", "max_tokens": 5, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.isascii() and line.startswith("data: {") for line in lines[:-1])
    assert "".join(json.loads(x[6:])["choices"][0]["text"] for x in lines[:-1]) == "a\u2028b"


def test_degraded_from_the_start(http, engine):
    engine.degraded_from_start = True
    body = {"prompt": "x", "max_tokens": 2}
    whole = http.post("/v1/completions", json=body)
    assert whole.headers["x-revivemoe-quality"] == "degraded"
    assert whole.json()["quality"] == "degraded"
    stream = http.post("/v1/completions", json={**body, "stream": True})
    assert stream.headers["x-revivemoe-quality"] == "degraded"


def test_degraded_on_the_way(client, engine, http):
    engine.degraded_at_step = 1
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 3}
    response = http.post("/v1/completions", json=asked)
    assert "x-revivemoe-quality" not in response.headers
    assert response.json()["quality"] == "degraded"
    *before, last = client.completions.create(**asked, stream=True)
    assert last.quality == "degraded"
    assert all("quality" not in chunk.model_extra for chunk in before)


def test_a_failure_in_a_stream_is_an_error_event(client, engine, http):
    engine.fail_at_step = 2
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 9}
    chunks = iter(client.completions.create(**asked, stream=True))
    assert [next(chunks).choices[0].text for _ in range(2)] == ["x", "x"]
    with pytest.raises(openai.APIError, match="rank 2 is gone"):
        next(chunks)
    text = http.post("/v1/completions", json={**asked, "stream": True}).text
    assert "event: error\ndata: " in text
    assert text.endswith("data: [DONE]\n\n")
    assert engine.streams[-1].closed.is_set()


def test_a_failure_of_a_whole_request_is_its_status(client, engine):
    engine.fail_at_step = 2
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="tiny", prompt="x", max_tokens=9)
    assert error.value.status_code == 503
    assert error.value.code == "generation_failed"


def test_the_stream_of_a_finished_request_is_closed(client, engine):
    client.completions.create(model="tiny", prompt="x", max_tokens=2)
    list(client.completions.create(model="tiny", prompt="x", max_tokens=2, stream=True))
    assert all(stream.closed.is_set() for stream in engine.streams)
