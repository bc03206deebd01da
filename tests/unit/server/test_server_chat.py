import openai
import pytest

HELLO = [{"role": "user", "content": "hello"}]


def test_a_chat(client, engine, tokenizer):
    engine.script = lambda prompt, choice: tokenizer.encode("hello world<|im_end|>")
    done = client.chat.completions.create(model="tiny", messages=HELLO)
    assert done.object == "chat.completion"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == "hello world"
    assert done.choices[0].finish_reason == "stop"
    (prompt,) = engine.submissions[0].prompts
    assert tokenizer.decode(prompt) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.submissions[0].params.max_tokens == 256 - len(prompt)


def test_a_chat_stream(client, engine, tokenizer):
    engine.script = lambda prompt, choice: tokenizer.encode("hello €<|im_end|>")
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(deltas) == "hello €"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 6
    assert all(c.object == "chat.completion.chunk" for c in chunks)


def test_the_stream_helper_of_the_client_puts_it_together(client, engine, tokenizer):
    engine.script = lambda prompt, choice: tokenizer.encode(["xy", "ab"][choice] + "<|im_end|>")
    with client.chat.completions.stream(model="tiny", messages=HELLO, n=2) as stream:
        final = stream.get_final_completion()
    assert [c.message.content for c in final.choices] == ["xy", "ab"]


def test_text_parts_and_harmless_fields(client, engine, tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
        max_tokens=3,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        logit_bias={},
    )
    assert "a\nb<|im_end|>" in tokenizer.decode(engine.submissions[0].prompts[0])
    assert engine.submissions[0].params.max_tokens == 3


def test_logprobs(client, engine, tokenizer):
    engine.script = lambda prompt, choice: tokenizer.encode("é")
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "logprobs": True}
    done = client.chat.completions.create(**asked, top_logprobs=2)
    content = done.choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[0xC3], [0xA9]]
    assert [entry.logprob for entry in content] == [-0.5, -0.5]
    assert [len(entry.top_logprobs) for entry in content] == [2, 2]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [entry.token for (entry,) in streamed] == ["", "é"], "they join to the text"
    assert all(entry.top_logprobs == [] for (entry,) in streamed)


def test_token_ids(client, engine, tokenizer):
    engine.script = lambda prompt, choice: tokenizer.encode("abc")
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    extra = {"extra_body": {"return_token_ids": True}}
    done = client.chat.completions.create(**asked, **extra)
    prompt = list(engine.submissions[0].prompts[0])
    assert done.prompt_token_ids == prompt
    assert done.choices[0].token_ids == tokenizer.encode("abc")
    chunks = list(client.chat.completions.create(**asked, **extra, stream=True))
    assert chunks[0].prompt_token_ids == prompt
    assert [i for c in chunks for i in c.choices[0].token_ids] == tokenizer.encode("abc")


def test_degraded(client, engine):
    engine.degraded_at_step = 0
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
    assert client.chat.completions.create(**asked).quality == "degraded"
    assert list(client.chat.completions.create(**asked, stream=True))[-1].quality == "degraded"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "messages.0.tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0"),
    ],
)
def test_bad_messages_are_named(client, messages, named):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=messages)
    assert error.value.param == named


def test_a_model_without_chat_template_says_so(client, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=HELLO)


def test_a_template_that_refuses_is_a_bad_request(client, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles alternate') }}")
    with pytest.raises(openai.BadRequestError, match="roles alternate"):
        client.chat.completions.create(model="tiny", messages=HELLO)
