"""`langchain-openai`: chat and completion models, and the errors it knows."""

from typing import Any

import pytest
from support.served import PROMPT, Served, run_client

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("libraries")]

ERRORS = {
    "json_schema": ("BadRequestError", "`response_format` is not supported by this server"),
    "json_mode": ("BadRequestError", "`response_format` is not supported by this server"),
    "function_calling": ("BadRequestError", "is not supported by this server (tool calling)"),
    "tools": ("BadRequestError", "`tools` is not supported by this server"),
    "too long": ("ContextOverflowError", "maximum context length is 2048 tokens"),
    "too long stream": ("ContextOverflowError", "maximum context length is 2048 tokens"),
    "model": ("NotFoundError", "`another` does not exist"),
    "key": ("AuthenticationError", "the API key is missing or wrong"),
    "responses": ("NotFoundError", "/v1/responses is not supported by this server"),
}


@pytest.fixture(scope="module")
def found(served: Served) -> dict[str, Any]:
    return dict(run_client("langchain_client", served))


def usage(plain: dict[str, Any]) -> dict[str, int]:
    names = {"input": "prompt", "output": "completion", "total": "total"}
    return {name: plain["usage"][f"{ours}_tokens"] for name, ours in names.items()}


def content(plain: dict[str, Any]) -> str:
    return str(plain["choices"][0]["message"]["content"])


def test_a_chat(found: dict[str, Any], served: Served) -> None:
    plain = served.chat()
    assert found["chat"] == [content(plain), usage(plain), "length"]
    stream = found["stream"]
    assert "".join(stream["parts"]) == stream["whole"] == content(plain)
    assert len(stream["parts"]) > 2
    assert (stream["usage"], stream["reason"]) == (usage(plain), "length")


def test_log_probabilities(found: dict[str, Any], served: Served) -> None:
    plain = served.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert found["logprobs"] == pytest.approx([e["logprob"] for e in plain], abs=1e-3)


def test_a_batch(found: dict[str, Any], served: Served) -> None:
    words = ("Hello?", "Once", "Two and two")
    assert found["batch"] == [content(served.chat(one)) for one in words]


def test_completions(found: dict[str, Any], served: Served) -> None:
    plain = served.complete()
    text = plain["choices"][0]["text"]
    assert found["text"] == "".join(found["text stream"]) == text
    both = served.complete([PROMPT, "Once"])
    assert found["generated"] == [choice["text"] for choice in both["choices"]]
    assert found["generated usage"] == both["usage"]


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_of_its_class(found: dict[str, Any], what: str) -> None:
    error, (name, said) = found["errors"][what], ERRORS[what]
    assert error is not None, "nothing was raised"
    assert name in error["classes"]
    assert said in error["message"]
