"""What a body may cost before it is refused: counted, not timed."""

import json
import sys

import pytest
from pydantic import BaseModel, ValidationError

from revivemoe.server import bodies
from revivemoe.server.brief import brief
from revivemoe.server.errors import ApiError
from revivemoe.server.fields import acted_upon
from revivemoe.server.schema import ChatRequest, CompletionRequest, validate
from revivemoe.server.token_routes import MAX_TOKENS, Detokenize

MESSAGE = {"role": "user", "content": "x"}


def calls(work) -> int:
    """Python's and C's functions called meanwhile; generators count each time they go on."""
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_name_that_is_there_twice_is_looked_for_once() -> None:
    text = "{" + ", ".join(f'"{k}": 1' for k in range(10_000)) + ', "9999": 1}'

    def parse() -> None:
        with pytest.raises(ValueError, match="'9999' occurs twice"):
            bodies._parsed(bytearray(text.encode()), float)

    assert calls(parse) < 11_000


def test_an_emoji_does_not_make_python_read_every_character() -> None:
    document = {"prompt": "x" * 100_000, "metadata": {str(k): ["😀"] for k in range(1000)}}
    text = json.dumps(document)
    assert "\\ud83d" in text
    assert calls(lambda: bodies._parsed(bytearray(text.encode()), float)) < 2000
    for lone in (
        '["\\ud800"]',
        '{"\\udc00": 1}',
        '["\\ude00\\ud83d"]',
        '{"a": [{"b": "x\\ud9ff"}]}',
    ):
        with pytest.raises(ValueError, match="lone surrogate"):
            bodies._parsed(bytearray(lone.encode()), float)
    assert bodies._parsed(bytearray(b'["\\\\ud800"]'), float) == ["\\ud800"]


MANY = 20_000


@pytest.mark.parametrize(
    ("form", "document"),
    [
        (ChatRequest, {"messages": [1] * MANY}),
        (ChatRequest, {"messages": [MESSAGE], "documents": [1] * MANY}),
        (ChatRequest, {f"name{k}": 1 for k in range(MANY)}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [""] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": ["x"] * MANY}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(k): "x" for k in range(MANY)}}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {f"x{k}": 1 for k in range(MANY)}}),
        (CompletionRequest, {"prompt": "x", "stream_options": {str(k): 1 for k in range(MANY)}}),
        (Detokenize, {"tokens": ["x"] * MANY}),
        (Detokenize, {"tokens": [1] * (MAX_TOKENS + 1)}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_one_error_is_enough(form: type[BaseModel], document: dict[str, object]) -> None:
    def check() -> None:
        with pytest.raises(ValidationError) as caught:
            form.model_validate(document)
        assert caught.value.error_count() < 5

    assert calls(check) < 1000
    with pytest.raises(ApiError) as refused:
        validate(form, document)
    assert len(str(refused.value)) < 400


def test_unknown_names_are_not_gone_through() -> None:
    names = {str(k): 1 for k in range(MANY)}
    assert acted_upon({"model": "tiny", **names}, ("model",)) == {"model": "tiny", "0": 1}


def test_an_unknown_name_is_told_before_what_is_missing() -> None:
    with pytest.raises(ApiError, match="unknown field `frobnicate`"):
        validate(CompletionRequest, {"frobnicate": 1})
    with pytest.raises(ApiError, match=r"unknown field `stream_options\.a`"):
        validate(CompletionRequest, {"prompt": "x", "stream_options": {"a": 1, "b": 2}})


class Counted:
    looked_at = 0

    def __repr__(self) -> str:
        Counted.looked_at += 1
        return "?"


def test_an_error_message_looks_at_no_more_than_it_shows() -> None:
    assert brief([Counted()] * 100_000).endswith("...")
    assert Counted.looked_at < 100
    for value in ([], {}, [1, "a", None], {"a": {"b": [True]}}, 1.5, "x" * 78):
        assert brief(value) == repr(value)
    for value in ("x" * 10**6, [[]] * 1000, {"a" * 1000: 1}, [["x" * 500] * 500] * 500):
        assert brief(value) == repr(value)[:77] + "..."


HUGE = "x" * 10_000


@pytest.mark.parametrize(
    "body",
    [
        {"model": HUGE},
        {"n": HUGE, "best_of": 3},
        {"messages": [{"role": [HUGE] * 10}]},
        {"messages": HUGE},
        {HUGE: 1},
        {"temperature": [HUGE]},
        {"truncation_side": HUGE},
    ],
    ids=lambda body: next(iter(body))[:20],
)
def test_what_was_sent_does_not_come_back_whole(http, body) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [MESSAGE], **body})
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 600
    wrong = {"instruction": HUGE, "kind": HUGE, "id": 1}
    answer = http.post("/v1/fault_tolerance/apply", json={"instruction": wrong["instruction"]})
    assert (answer.status_code, len(answer.content) < 600) == (400, True)
