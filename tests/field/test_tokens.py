"""`/tokenize` and `/detokenize`: the fields they share with the other endpoints; large ones."""

import threading

import pytest

from revivemoe.detokenizer import Vocabulary
from revivemoe.server import token_routes

TEXT = {"prompt": "hello"}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TOKENS = {"tokens": [1, 2]}
ENDPOINTS = [("/tokenize", TEXT), ("/tokenize", CHAT), ("/detokenize", TOKENS)]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(
    "beside",
    [{"tools": []}, {"mm_processor_kwargs": {}}, {"chat_template": ""}, {"user": "me"},
     {"model": None}, {"tools": None}, {"cache_salt": None}],
)  # fmt: skip
def test_what_asks_for_nothing_is_taken(http, path, body, beside):
    plain, answer = http.post(path, json=body), http.post(path, json={**body, **beside})
    assert answer.status_code == 200, answer.text
    assert answer.json() == plain.json()


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("beside", [{"tools": [{}]}, {"chat_template": "x"}, {"user": 5}])
def test_what_is_not_there_is_refused(http, path, body, beside):
    answer = http.post(path, json={**body, **beside})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(beside))


def test_integral_floats_are_token_ids(http):
    answers = [http.post("/detokenize", json={"tokens": ids}) for ids in ([1, 2], [1.0, 2.0])]
    assert answers[0].json() == answers[1].json()
    assert http.post("/detokenize", json={"tokens": [1.5]}).status_code == 400


def test_too_many_tokens_are_refused(http, monkeypatch):
    many = [1] * (token_routes.MAX_TOKENS + 1)
    answer = http.post("/detokenize", json={"tokens": many})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")


@pytest.mark.parametrize(("many", "aside"), [(100, False), (5000, True)])
def test_many_tokens_do_not_hold_up_the_loop(http, engine, monkeypatch, many, aside):
    threads: dict[str, set[int]] = {"decode": set(), "token": set(), "loop": set()}
    decode, token = Vocabulary.decode, Vocabulary.token

    def noted(name, method):
        def call(*arguments, **options):
            threads[name].add(threading.get_ident())
            return method(*arguments, **options)

        return call

    monkeypatch.setattr(Vocabulary, "decode", noted("decode", decode))
    monkeypatch.setattr(engine, "metrics", noted("loop", lambda: b""))
    http.get("/metrics")
    ids = [5] * many
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    monkeypatch.setattr(Vocabulary, "token", noted("token", token))
    given = {"prompt": text, "return_token_strs": True, "add_special_tokens": False}
    answer = http.post("/tokenize", json=given).json()
    assert answer["count"] == len(answer["token_strs"]) == many
    assert threads["decode"].isdisjoint(threads["loop"]) == aside
    assert threads["token"].isdisjoint(threads["loop"]) == aside
