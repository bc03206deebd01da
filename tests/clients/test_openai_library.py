"""The newest `openai` client: every way of asking brings what plain httpx gets."""

from typing import Any

import pytest
from support.served import PROMPT, Served, run_client

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("libraries")]

REFUSALS = {
    "temperature": ("BadRequestError", 400),
    "model": ("NotFoundError", 404),
    "too long": ("BadRequestError", 400),
    "too long stream": ("BadRequestError", 400),
    "unknown field": ("BadRequestError", 400),
    "tools": ("BadRequestError", 400),
    "key": ("AuthenticationError", 401),
    "key of models": ("AuthenticationError", 401),
    "timeout": ("APITimeoutError", None),
    "connection": ("APIConnectionError", None),
    "responses": ("NotFoundError", 404),
    "embeddings": ("NotFoundError", 404),
    "no such model": ("NotFoundError", 404),
}


@pytest.fixture(scope="module")
def found(served: Served) -> dict[str, Any]:
    return dict(run_client("openai_client", served))


def test_models(found: dict[str, Any], served: Served) -> None:
    assert found["models"] == [served.model]
    (card,) = served.ask("GET", "/v1/models").json()["data"]
    assert found["model"] == {**found["model"], **card}


def test_a_completion(found: dict[str, Any], served: Served) -> None:
    plain = served.complete()
    text = plain["choices"][0]["text"]
    assert found["completion"] == [text, plain["usage"]]
    stream = found["completion stream"]
    assert "".join(stream["parts"]) == text
    assert len(stream["parts"]) > 2
    assert stream["usages"] == [plain["usage"]]


def test_a_chat(found: dict[str, Any], served: Served) -> None:
    plain = served.chat()
    content = plain["choices"][0]["message"]["content"]
    assert found["chat"] == [content, plain["usage"]]
    stream = found["chat stream"]
    assert "".join(stream["parts"]) == content
    assert stream["usages"] == [plain["usage"]]
    assert "".join(found["events"]["deltas"]) == found["events"]["content"] == content


def test_log_probabilities(found: dict[str, Any], served: Served) -> None:
    plain = served.complete(logprobs=2, echo=True)["choices"][0]["logprobs"]
    scored = found["completion logprobs"]
    assert (scored["tokens"], scored["text_offset"]) == (plain["tokens"], plain["text_offset"])
    assert scored["token_logprobs"][1:] == pytest.approx(plain["token_logprobs"][1:], abs=1e-3)
    assert [len(top) for top in scored["top_logprobs"][-12:]] == [2] * 12
    plain = served.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    for got, told in zip(found["chat logprobs"]["content"], plain["content"], strict=True):
        assert (got["token"], got["bytes"]) == (told["token"], told["bytes"])
        assert got["logprob"] == pytest.approx(told["logprob"], abs=1e-3)
        assert len(got["top_logprobs"]) == 2


def test_raw_answers(found: dict[str, Any]) -> None:
    raw = found["raw"]
    assert raw["content_type"] == "application/json"
    assert raw["id"] == "cmpl-mine"
    assert raw["stream_content_type"].startswith("text/event-stream")
    assert raw["last_line"] == "data: [DONE]"
    assert raw["num_lines"] > 3


def test_extra_body(found: dict[str, Any], served: Served) -> None:
    plain = served.complete(PROMPT, max_tokens=6, return_token_ids=True)
    assert found["extra_body"] == plain["choices"][0]["token_ids"]


@pytest.mark.parametrize("what", REFUSALS)
def test_an_error_is_of_its_class(found: dict[str, Any], what: str) -> None:
    error = found["errors"][what]
    assert error is not None, "nothing was raised"
    assert (error["class"], error["status_code"]) == REFUSALS[what]


def test_errors_say_what_is_wrong(found: dict[str, Any]) -> None:
    errors = found["errors"]
    assert errors["too long"]["code"] == "context_length_exceeded"
    assert errors["too long stream"]["code"] == "context_length_exceeded"
    assert errors["model"]["code"] == "model_not_found"
    assert errors["temperature"]["param"] == "temperature"
    assert errors["unknown field"]["param"] == "colour"
    assert errors["key"]["code"] == "invalid_api_key"
    assert "/v1/responses is not supported" in errors["responses"]["message"]


def test_many_at_once(served: Served) -> None:
    found = run_client("openai_async_client", served)
    words = ["Hello?", "When a device fails", "Two and two", "Once"] * 4
    plain = {one: served.chat(one)["choices"][0]["message"]["content"] for one in words[:4]}
    assert found["whole"] == found["parts"] == [plain[one] for one in words]
    assert found["models"] == [served.model]
    assert (found["left early"], found["cancelled"]) == (2, "CancelledError")
    served.await_running(0)
