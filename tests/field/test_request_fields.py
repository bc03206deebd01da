"""Every request field of OpenAI's API and vLLM's: acted on, accepted without effect, or refused."""

import pytest

from revivemoe.server.fields import ACCEPTED, REFUSED
from revivemoe.server.schema import ChatRequest, CompletionRequest

PATHS = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}
SAMPLES = {bool: True, dict: {"a": "b"}, str: "x", int: 3, float: 0.5}
WRONG = {bool: "x", dict: [], str: 5, int: "x", float: "x"}
ACTED_ON = {
    "logit_bias": {"5": -100},
    "chat_template_kwargs": {"enable_thinking": False},
    "documents": [{"title": "a", "text": "b"}],
    "reasoning_effort": "low",
    "max_completion_tokens": 4.0,
    "top_p": 0,
    "top_k": -1,
    "n": 2.0,
    "seed": 1.0,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 2,
    "return_tokens_as_token_ids": True,
    "request_id": "mine",
    "stop": ["x", "y"],
    "echo": True,
    "add_generation_prompt": False,
}


def asked(http, path, **fields):
    return http.post(path, json={**PATHS[path], **fields})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_what_changes_nothing_is_accepted(http, engine, path, name):
    kinds = ACCEPTED[name].kinds
    plain = asked(http, path, seed=1).json()
    given = asked(http, path, seed=1, **{name: SAMPLES[kinds[0]]})
    assert given.status_code == 200, given.text
    assert given.json()["choices"] == plain["choices"]
    assert engine.submissions[0].params == engine.submissions[1].params
    assert asked(http, path, **{name: None}).is_success
    refused = asked(http, path, **{name: WRONG[kinds[0]]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_there_is_refused_and_asking_for_nothing_is_not(http, engine, path, name):
    refused = asked(http, path, **{name: {"some": ["thing"]}})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert "\n" not in error["message"]
    assert not engine.submissions
    for nothing in (None, *REFUSED[name].nothing):
        assert asked(http, path, **{name: nothing}).is_success


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for name in sorted(ACTED_ON) for path in PATHS
     if name in (CompletionRequest if "chat" not in path else ChatRequest).model_fields],
)  # fmt: skip
def test_what_is_acted_on_is_taken(http, path, name):
    answer = asked(http, path, **{name: ACTED_ON[name]})
    assert answer.status_code == 200, answer.text


def test_no_field_is_in_two_places():
    acted = set(CompletionRequest.model_fields) | set(ChatRequest.model_fields)
    assert not acted & (set(ACCEPTED) | set(REFUSED))
    assert not set(ACCEPTED) & set(REFUSED)


def test_an_unknown_field_is_named_with_what_it_may_have_meant(http):
    error = asked(http, "/v1/completions", max_new_tokens=5).json()["error"]
    assert "did you mean `max_tokens`" in error["message"]
    assert error["code"] == "unknown_parameter"


def test_integral_floats_bias_and_bounds_reach_the_engine(http, engine):
    fields = {"max_tokens": 2.0, "top_k": 10**30, "logit_bias": {"7": 1e9, "5": -3}, "top_p": 0}
    assert asked(http, "/v1/completions", **fields).is_success
    params = engine.submissions[0].params
    assert (params.max_tokens, params.top_p) == (2, 0)
    assert params.top_k == engine.model.vocab_size
    assert params.logit_bias == ((5, -3.0), (7, 100.0))


@pytest.mark.parametrize("path", PATHS)
def test_the_newer_name_of_max_tokens_is_the_one_that_counts(http, engine, path):
    asked(http, path, max_completion_tokens=3)
    asked(http, path, max_completion_tokens=3, max_tokens=7)
    asked(http, path, max_completion_tokens=None, max_tokens=7)
    assert [s.params.max_tokens for s in engine.submissions] == [3, 3, 7]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_tokens_are_refused_by_either_name(http, engine, path, name):
    error = asked(http, path, **{name: 0}).json()["error"]
    assert error["param"] == name
    assert f"`{name}`" in error["message"]
    assert not engine.submissions


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_echo_of_no_tokens_by_either_name(http, name):
    answer = asked(http, "/v1/completions", echo=True, **{name: 0})
    assert answer.json()["choices"][0]["text"] == "hello"


@pytest.mark.parametrize(
    "fields",
    [{"best_of": 1.0}, {"n": 2.0, "best_of": 2}, {"priority": 0.0}, {"stream_interval": 2.0},
     {"thinking_token_budget": -1.0}, {"routed_experts_prompt_start": 0.0},
     {"stop_token_ids": [5.0]}, {"logprobs": 1.0}, {"truncate_prompt_tokens": 3.0}],
)  # fmt: skip
def test_an_integral_number_is_an_integer(http, fields):
    answer = asked(http, "/v1/completions", **fields)
    assert answer.status_code == 200, answer.text
    name, value = next(iter(fields.items()))
    if isinstance(value, float):
        answer = asked(http, "/v1/completions", **{name: value + 0.5})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_an_integral_number_is_an_integer_for_an_operator_too(http, engine):
    params = {"id": 1.0, "ids": [2.0], "factor": 1.5}
    body = {"instruction": "pause", "params": params}
    assert http.post("/v1/fault_tolerance/apply", json=body).status_code == 202
    ((_, given, _),) = engine.applied
    assert (type(given["id"]), type(given["ids"][0]), given["factor"]) == (int, int, 1.5)


WIDE = {
    "temperature": [2.5, 1e300],
    "n": [129, 256],
    "stop": ["x" * 1024, [f"stop{k}" for k in range(1024)]],
    "stop_token_ids": [[5] * 1024],
}
"""What vLLM takes, too."""


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in WIDE.items() for v in vs])
def test_ranges_are_as_wide_as_can_be(http, engine, name, value):
    answer = asked(http, "/v1/completions", max_tokens=1, **{name: value})
    assert answer.status_code == 200, answer.text
    assert engine.submissions[0].params.temperature <= 1e30


@pytest.mark.parametrize("name", ["", None, "tiny", "/models/tiny", "/models/tiny/"])
def test_names_of_the_one_model(http, name):
    answer = asked(http, "/v1/completions", model=name)
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
    assert http.post("/tokenize", json={"prompt": "x", "model": name}).is_success
    assert http.get(f"/v1/models/{name or 'tiny'}").json()["id"] == "tiny"


def test_the_list_of_models_ends_with_a_slash_or_not(http):
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_a_request_id_comes_back(http):
    named = asked(http, "/v1/completions", request_id="abc").json()
    assert named["id"] == "cmpl-abc"
    headers = {"X-Request-Id": "from-a-proxy"}
    body = PATHS["/v1/chat/completions"]
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.json()["id"] == "chatcmpl-from-a-proxy"


def test_usage_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="tiny", prompt="abc", max_tokens=3, stream=True, stream_options=options
        )
    )
    assert [c.usage.completion_tokens for c in chunks] == [1, 2, 3, 3]
    assert {c.usage.prompt_tokens for c in chunks} == {3}


def test_truncation(http, engine, tokenizer):
    ids = tokenizer.encode("abcdef")
    for side, kept in (("left", ids[-2:]), ("right", ids[:2])):
        fields = {"prompt": ids, "truncate_prompt_tokens": 2, "truncation_side": side}
        assert asked(http, "/v1/completions", **fields).is_success
        assert list(engine.submissions[-1].prompts[0]) == kept


def test_names_by_token_id(client, tokenizer):
    done = client.completions.create(
        model="tiny", prompt="ab", max_tokens=2, logprobs=2,
        extra_body={"return_tokens_as_token_ids": True},
    )  # fmt: skip
    ids = tokenizer.encode("ab")
    assert done.choices[0].logprobs.tokens == [f"token_id:{i}" for i in ids]
    assert f"token_id:{ids[0]}" in done.choices[0].logprobs.top_logprobs[0]


def test_null_within_stream_options_is_as_if_left_out(http):
    options = {"include_usage": True, "continuous_usage_stats": None}
    assert asked(http, "/v1/completions", stream=True, stream_options=options).status_code == 200
