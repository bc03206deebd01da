"""Bodies are JSON, and say so: a web page that may not ask cannot pass for a program."""

import pytest

BODY = b'{"prompt": "abc", "max_tokens": 2}'
PAGE = {"Origin": "https://page.example"}


def status(http, headers, path="/v1/completions") -> int:
    answer = http.post(path, content=BODY, headers=headers)
    if answer.status_code == 415:
        error = answer.json()["error"]
        assert "-H 'Content-Type: application/json'" in error["message"]
        assert len(answer.content) < 500
    return answer.status_code


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("text/plain; a=application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
        ("x" * 5000, 415),
    ],
)
def test_the_type_of_a_body(http, engine, kind, expected):
    assert status(http, {"Content-Type": kind}) == expected
    assert bool(engine.submissions) == (expected == 200)


def test_none_is_a_programs_not_a_pages(http):
    """A page can leave out the type (a Blob without one), but not its origin."""
    assert status(http, {}) == 200
    assert status(http, PAGE) == 415
    assert status(http, {**PAGE, "Content-Type": "application/json"}) == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/tokenize", "/detokenize", "/v1/fault_tolerance/apply",
     "/fault_tolerance/apply"],
)  # fmt: skip
def test_wherever_a_body_is_read(http, path):
    assert status(http, {"Content-Type": "text/plain"}, path) == 415
