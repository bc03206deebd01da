"""Prompts as clients send them: long ones, many of them, token ids; what is too long."""

import re
import threading
from types import SimpleNamespace

import pytest

from revivemoe.server.prompts import PromptEncoder

PATHS = {
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def seen(tokenizer, monkeypatch):
    """What was tokenised and rendered: lengths of the texts, and in how many threads."""
    seen = SimpleNamespace(lengths=[], encoded_in=set(), rendered_in=set())
    encode, render = tokenizer.encode, tokenizer.apply_chat_template

    def watched_encode(text, **options):
        seen.lengths.append(len(text))
        seen.encoded_in.add(threading.get_ident())
        return encode(text, **options)

    def watched_render(conversation, chat_template=None, add_generation_prompt=False, **options):
        seen.rendered_in.add(threading.get_ident())
        options |= {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        return render(conversation, **options)

    monkeypatch.setattr(tokenizer, "encode", watched_encode)
    monkeypatch.setattr(tokenizer, "apply_chat_template", watched_render)
    return seen


# ---- too long --------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), PATHS.items(), ids=["completions", "chat"])
@pytest.mark.parametrize("length", [300, 5_000, 3_000_000])
def test_what_clients_look_for_to_shorten_a_prompt(http, path, body, length):
    error = http.post(path, json=body("a" * length)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    match = re.search(
        r"This model's maximum context length is (\d+) tokens\. However, your request has "
        r"(?:at least )?(\d+) input tokens: the prompt is too long\. Please reduce the length of "
        r"the input (\w+)\.",
        error["message"],
    )
    assert match, error["message"]
    assert match[1] == "256"
    assert 256 < int(match[2]) <= length + 20
    assert match[3] == error["param"]


def test_a_prompt_that_leaves_no_room_says_so(http):
    error = http.post("/v1/completions", json={"prompt": [5] * 256}).json()["error"]
    assert "256 input tokens and leaves no room for output:" in error["message"]


def test_a_prompt_that_is_far_too_long_is_not_tokenised_whole(http, seen):
    for path, body in PATHS.items():
        assert http.post(path, json=body("ab" * 10**6)).status_code == 400
    assert len(seen.lengths) == 2
    assert max(seen.lengths) < 20_000


def test_text_that_makes_few_tokens_is_not_refused_by_its_length(engine):
    """A tokenizer may drop, merge or eat what it likes: here a token for each 100 characters."""

    class Coarse:
        def encode(self, text, *, add_special_tokens):
            return [5] * (len(text) // 100)

    encoder = PromptEncoder(Coarse(), engine.model)
    assert len(encoder._prompt("x" * 20_000, True, _form(), "prompt", 1)) == 200


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 50, -1])
def test_the_kept_end_of_a_long_text_is_that_of_the_whole(
    start_server, monkeypatch, tokenizer, side, keep
):
    """Digits by three, from the first one on: what the last are hangs on how many there are."""

    def by_three(text, *, add_special_tokens=True):
        return [len(text[k : k + 3]) for k in range(0, len(text), 3)]

    monkeypatch.setattr(tokenizer, "encode", by_three)
    text, fields = "1" * 50_001, {"truncate_prompt_tokens": keep, "truncation_side": side}
    with start_server() as server, server.http() as http:
        assert http.post("/v1/completions", json={"prompt": text[1:], **fields}).is_success
        (prompt,) = server.engine.submissions[0].prompts
    ids, count = by_three(text[1:]), 255 if keep < 0 else keep
    assert list(prompt) == (ids[-count:] if side == "left" else ids[:count])


def test_no_text_is_tokenised_without_end(http, seen):
    """Millions of tokens take gigabytes; what they are asked for does not matter."""
    text = "ab" * (2**21 + 1)
    for path, body in {
        "/tokenize": {"prompt": text},
        "/v1/completions": {"prompt": text, "truncate_prompt_tokens": 1},
    }.items():
        answer = http.post(path, json=body)
        assert answer.status_code == 400
        assert "too long: at most 4194304" in answer.json()["error"]["message"]
    assert not seen.lengths


def _form():
    return SimpleNamespace(truncate_prompt_tokens=None, truncation_side="left")


# ---- not on everybody's loop -------------------------------------------------------------------


def test_short_ones_stay_on_the_loop(http, seen, server):
    assert http.post("/v1/completions", json={"prompt": ["ab", "cd"]}).is_success
    assert http.post("/v1/chat/completions", json={"messages": HI}).is_success
    assert seen.encoded_in == seen.rendered_in == {server._thread.ident}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        {"messages": HI * 2000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 900}]},
        {"messages": HI, "documents": [{"text": "x" * 5000}]},
        {"messages": HI, "chat_template_kwargs": {"turns": 10**9}},
        {"messages": HI, "chat_template_kwargs": {"x" * 5000: None}},
    ],
    ids=["long", "turns", "parts", "documents", "number", "names"],
)
def test_a_conversation_that_may_take_long_is_rendered_in_a_thread(
    http, seen, server, path, fields
):
    http.post(path, json=fields)
    assert seen.rendered_in
    assert server._thread.ident not in seen.rendered_in | seen.encoded_in


def test_many_short_prompts_are_tokenised_in_one_thread(http, seen, server):
    assert http.post("/v1/completions", json={"prompt": ["ab" * 50] * 100}).is_success
    assert len(seen.lengths) == 100
    assert len(seen.encoded_in) == 1
    assert server._thread.ident not in seen.encoded_in


# ---- token ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[1.0, 2], [[1.0, 2.0]], [[1, 2]]])
def test_integral_numbers_are_token_ids(http, engine, prompt):
    body = {"prompt": prompt, "echo": True, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).is_success
    (ids,) = engine.submissions[0].prompts
    assert ids == (1, 2)
    assert all(type(i) is int for i in ids)


@pytest.mark.parametrize("prompt", [[True], [1, True], [[1], [False]], [1.5], [[1.5]], [1, None]])
def test_other_things_are_no_token_ids(http, engine, prompt):
    answer = http.post("/v1/completions", json={"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert not engine.submissions


@pytest.mark.parametrize("number", ["1e400", "NaN", "-Infinity"])
def test_no_number_is_no_token_id(http, number):
    answer = http.post("/v1/completions", content=f'{{"prompt": [1, {number}]}}')
    assert answer.status_code == 400
