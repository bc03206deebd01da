import openai
import pytest

from revivemoe.streams import EngineUnavailable


def refused(http, status=400, path="/v1/completions", **body):
    response = http.post(path, json={"prompt": "hello", **body})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n", 0, "greater than or equal to 1"),
        ("n", 1025, "less than or equal to 1024"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", "hot", "valid number"),
        ("top_p", -0.1, "greater than or equal to 0"),
        ("top_p", True, "valid number"),
        ("max_tokens", 2.5, "valid integer"),
        ("logit_bias", {"999999": 1}, "outside the vocabulary"),
        ("user", 5, "must be a string"),
        ("store", "yes", "must be a boolean"),
        ("priority", True, "must be an integer"),
        ("truncate_prompt_tokens", -2, "greater than or equal to -1"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("top_k", -2, "greater than or equal to -1"),
        ("top_k", 1.5, "valid integer"),
        ("min_p", 2, "less than or equal to 1"),
        ("presence_penalty", 3, "less than or equal to 2"),
        ("repetition_penalty", 0, "greater than or equal to 0.01"),
        ("seed", 1 << 64, "less than"),
        ("seed", "7", "valid integer"),
        ("max_tokens", -1, "greater than or equal to 0"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", True, "valid integer"),
        ("min_tokens", 17, "at most the 16 tokens"),
        ("logprobs", 21, "less than or equal to 20"),
        ("stop_token_ids", [10**6], "outside the vocabulary"),
        ("stop", ["x"] * 1025, "at most 1024"),
        ("stop", ["x" * 1000] * 17, "at most 16384 characters are allowed in all"),
        ("stop_token_ids", [1] * 1025, "at most 1024"),
        ("logit_bias", {str(k): 1 for k in range(4097)}, "`logit_bias`: at most 4096"),
        ("stream", "yes", "valid boolean"),
        ("stream_options", {"include_usage": True}, "needs `stream`"),
        ("prompt", [10**6], "outside the vocabulary"),
        ("prompt", [-1], "outside the vocabulary"),
        ("prompt", "", "empty"),
        ("prompt", [], "empty"),
        ("prompt", [[]], "empty"),
        ("prompt", [1, "a"], "must be a string"),
        ("prompt", {"a": 1}, "must be a string"),
        ("prompt", None, "required"),
        ("frobnicate", 1, "unknown field"),
    ],
)
def test_wrong_values_are_named_with_their_range(http, engine, field, value, said):
    error = refused(http, **{field: value})
    assert error["param"] == field
    assert field in error["message"] or field == "prompt"
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.submissions == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {}),
        ("structured_outputs", {"json": {}}),
        ("prompt_logprobs", 1),
        ("allowed_token_ids", [1]),
        ("best_of", 2.5),
        ("use_beam_search", 1),
        ("tool_choice", "required"),
        ("best_of", 2),
        ("use_beam_search", True),
        ("suffix", "x"),
        ("audio", {}),
        ("modalities", ["audio"]),
    ],
)
def test_what_is_not_supported_is_refused(http, field, value):
    error = refused(http, **{field: value})
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == field
    assert f"`{field}` is not supported" in error["message"]


@pytest.mark.parametrize("bias", [{"x": 1}, {"5": "much"}, {"5": None}, {"-1": 1}, [5]])
def test_a_bias_that_is_none_is_refused(http, bias):
    assert refused(http, logit_bias=bias)["param"].startswith("logit_bias")


def test_an_empty_stop_string_is_refused(http):
    assert refused(http, stop=["ok", ""])["param"] == "stop.1"


def test_null_means_absent(http):
    fields = ["n", "seed", "temperature", "stop", "max_tokens", "logprobs", "tools", "suffix"]
    body = {"prompt": "x", **dict.fromkeys(fields)}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.post("/v1/completions", json={"prompt": "x", "n": 1, "best_of": 1}).is_success


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"prompt": NaN}', b"[" * 10**5])
def test_what_is_no_json_object_is_refused(http, body):
    response = http.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_nan_is_no_temperature(http):
    body = b'{"prompt": "x", "temperature": NaN}'
    assert "temperature" in http.post("/v1/completions", content=body).json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused(http):
    response = http.post("/v1/completions", content=b'{"prompt": "\\ud800"}')
    assert response.status_code == 400


def test_a_prompt_too_long_names_both_lengths(http):
    error = refused(http, prompt=[5] * 256)
    assert error["code"] == "context_length_exceeded"
    assert "length is 256 tokens" in error["message"]
    assert "has 256 input tokens" in error["message"]
    assert refused(http, prompt="ab " * 5000)["code"] == "context_length_exceeded"


def test_max_tokens_is_an_upper_bound(http, engine):
    for wanted in (6, 7, 10**6, 8192.0):
        assert http.post(
            "/v1/completions", json={"prompt": [5] * 250, "max_tokens": wanted}
        ).is_success
    assert [s.params.max_tokens for s in engine.submissions] == [6, 6, 6, 6]
    assert http.post("/v1/completions", json={"prompt": [5] * 250}).is_success


def test_too_many_choices(http):
    assert refused(http, prompt=["x"] * 9, n=128)["param"] == "n"
    assert refused(http, prompt=["x"] * 1025)["param"] == "prompt"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="x")
    assert error.value.code == "model_not_found"


def test_chat_names_its_own_fields(http):
    chat = {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "x"}]}
    assert refused(http, **chat)["param"] == "prompt"
    response = http.post(chat["path"], json={"messages": chat["messages"], "top_logprobs": 2})
    assert response.json()["error"]["param"] == "top_logprobs"
    body = {"messages": chat["messages"], "max_completion_tokens": 0}
    error = http.post(chat["path"], json=body).json()["error"]
    assert error["param"] == "max_completion_tokens"


def test_unknown_paths_and_methods_are_api_errors(http):
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    response = http.get("/v1/completions")
    assert response.status_code == 405
    assert "GET /v1/completions" in response.json()["error"]["message"]


def test_an_engine_that_takes_nothing_is_503(http, engine):
    engine.unavailable = EngineUnavailable("no ranks are left", 2.4)
    response = http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["message"] == "no ranks are left"
    stream = http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert stream.status_code == 503


def test_our_own_bug_is_a_500_without_details(http, engine, caplog):
    engine.broken = True
    response = http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "a bug of ours" not in response.text
    assert "KeyError" in caplog.text


def test_bad_requests_disturb_nobody(client, http, engine, tokenizer):
    engine.step_s = 0.01
    chunks = client.completions.create(model="tiny", prompt="ab", max_tokens=20, stream=True)
    text = next(iter(chunks)).choices[0].text
    for _ in range(5):
        http.post("/v1/completions", content=b"{")
    text += "".join(chunk.choices[0].text for chunk in chunks)
    assert text == "ab" * 10
