"""`litellm`, by both names under which it knows servers such as this one."""

from typing import Any

import pytest
from support.served import Served, run_client

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("libraries")]

ERRORS = {
    "too long": ("ContextWindowExceededError", 400),
    "too long stream": ("ContextWindowExceededError", 400),
    "temperature": ("BadRequestError", 400),
    "model": ("NotFoundError", 404),
    "key": ("AuthenticationError", 401),
    "tools": ("BadRequestError", 400),
    "response_format": ("BadRequestError", 400),
}


@pytest.fixture(scope="module", params=["openai/", "hosted_vllm/"])
def found(served: Served, request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(run_client("litellm_client", served, request.param))


def usage(plain: dict[str, Any]) -> dict[str, int]:
    return {name: plain["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")}


def test_a_chat(found: dict[str, Any], served: Served) -> None:
    plain = served.chat()
    content = plain["choices"][0]["message"]["content"]
    assert found["chat"] == [content, usage(plain), "length"]
    stream = found["stream"]
    assert "".join(stream["parts"]) == stream["built"] == content
    assert len(stream["parts"]) > 2
    assert stream["usages"] == [usage(plain)]
    assert stream["built usage"] == usage(plain)
    assert stream["reasons"] == ["length"]


def test_log_probabilities(found: dict[str, Any], served: Served) -> None:
    plain = served.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert found["chat logprobs"] == pytest.approx([e["logprob"] for e in plain], abs=1e-3)


def test_a_text_completion(found: dict[str, Any], served: Served) -> None:
    plain = served.complete()
    assert found["text"] == [plain["choices"][0]["text"], usage(plain)]
    assert "".join(found["text stream"]) == plain["choices"][0]["text"]


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_of_its_class(found: dict[str, Any], what: str) -> None:
    error = found["errors"][what]
    assert error is not None, "nothing was raised"
    assert (error["class"], error["status"]) == ERRORS[what], error["message"]
