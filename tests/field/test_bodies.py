"""Bodies as they should not be: a 4xx in OpenAI's form, and nothing else is touched."""

import json

import pytest

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v1/fault_tolerance/apply",
    "/fault_tolerance/apply",
    "/v1/fault_tolerance/inject",
)
LONE = '"\\ud800"'
BODIES = {
    "nothing": b"",
    "no json": b"{",
    "two documents": b"{} {}",
    "a list": b"[1]",
    "utf-16": json.dumps({"prompt": "x"}).encode("utf-16"),
    "utf-32": json.dumps({"prompt": "x"}).encode("utf-32-le"),
    "latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "gzip": b"\x1f\x8b\x08\x00",
    "NaN": b'{"prompt": NaN}',
    "deep": b"[" * 10**5,
    "deep objects": b'{"a":' * 10**4,
    "deep, and balanced": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of 5000 digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "a huge exponent": b'{"prompt": "x", "temperature": 1e999}',
    "twice the same name": b'{"prompt": "x", "prompt": "y", "messages": []}',
    "twice within": b'{"prompt": "x", "stream_options": {"a": 1, "a": 2}}',
    "half a pair as a value": b'{"prompt": %s}' % LONE.encode(),
    "half a pair as a name": b'{"prompt": "x", %s: 1}' % LONE.encode(),
    "half a pair far within": b'{"prompt": "x", "params": {"detail": ["a", {"b": %s}]}}'
    % LONE.encode(),
    "half a pair as an id": b'{"instruction": "pause", "request_id": %s, "prompt": "x"}'
    % LONE.encode(),
    "a name of a megabyte": b'{"prompt": "x", "' + b"a" * 10**6 + b'": 1}',
}


@pytest.fixture(scope="module")
def armed(shared_server, tokenizer):
    """With fault injection on, so that `inject` looks at its body."""
    from unit.server.conftest import running
    from unit.server.fake_engine import FakeEngine

    with running(FakeEngine(tokenizer), enable_fault_injection=True) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body_is_a_4xx(armed, path, what):
    with armed.http() as http:
        answer = http.post(path, content=BODIES[what])
        assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:200])
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000
        assert http.get("/v1/fault_tolerance/status").is_success
    assert not armed.engine.submissions
    assert not armed.engine.applied


VALUES = (None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", [], {}, [[]], [{}], {"a": []})


@pytest.mark.parametrize(
    "name",
    ["n", "seed", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "max_tokens",
     "min_tokens", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs", "echo",
     "stream", "stream_options", "truncate_prompt_tokens", "prompt", "messages", "documents",
     "chat_template_kwargs", "reasoning_effort", "top_logprobs", "request_id", "model"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_any_value_is_taken_or_refused(http, path, name):
    body = (
        {"prompt": "a"} if "chat" not in path else {"messages": [{"role": "user", "content": "a"}]}
    )
    for value in VALUES:
        answer = http.post(path, json={**body, name: value})
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (value, answer.text)


def test_whatever_an_engine_holds_can_be_told(http, engine, monkeypatch):
    monkeypatch.setattr(engine, "status", lambda: {"detail": "\ud800"})
    assert http.get("/v1/fault_tolerance/status").json() == {"detail": "\ud800"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [5] * 300}),
        ("/v1/completions", {"prompt": "ab " * 5000, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab " * 5000}]}),
    ],
)
def test_clients_know_an_overflow_by_its_words(http, path, body):
    """vLLM's first sentence, by which litellm does, and the last words, by which langchain does."""
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith("This model's maximum context length is 256 tokens")
    assert "input tokens: the prompt is too long" in error["message"]
