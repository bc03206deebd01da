"""Messages as clients send them."""

import pytest

CHAT = "/v1/chat/completions"
TEMPLATE_WITH_SWITCH = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.reasoning_content }};{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}no thinking{% endif %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def chat(http, *messages, **fields):
    return http.post(CHAT, json={"messages": list(messages), **fields})


def prompt_of(engine, tokenizer):
    return tokenizer.decode(engine.submissions[-1].prompts[0])


@pytest.mark.parametrize(
    "extra",
    [
        {"type": "text"},
        {"id": "m-1", "opts": {"a": 1}},
        {
            "refusal": None,
            "annotations": [],
            "audio": None,
            "tool_calls": [],
            "function_call": None,
        },
        {"tool_call_id": None, "weight": 1, "timestamp": 3.5, "prefix": False},
        {"name": "anna"},
    ],
)
def test_extras_on_a_message_have_no_effect(http, engine, tokenizer, extra):
    assert chat(http, {"role": "user", "content": "hi"}).is_success
    answer = chat(http, {"role": "user", "content": "hi", **extra})
    assert answer.status_code == 200, answer.text
    assert engine.submissions[0].prompts == engine.submissions[1].prompts


@pytest.mark.parametrize("content", [None, [], ""])
@pytest.mark.parametrize("role", ["assistant", "user", "system"])
def test_no_content(http, content, role):
    given = {"role": role, "content": content}
    assert chat(http, {"role": "user", "content": "a"}, given).status_code == 200


def test_parts_of_every_kind_of_text(http, engine, tokenizer):
    parts = [
        "a",
        {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert chat(http, {"role": "user", "content": parts}).is_success
    assert "a\nb\nc\nd<|im_end|>" in prompt_of(engine, tokenizer)


KNOWS_DEVELOPER = (
    "{% for m in messages %}{% if m.role == 'developer' %}[rule]{{ m.content }}"
    "{% elif m.role == 'user' %}user:{{ m.content }}{% endif %}{% endfor %}"
)
DROPS_DEVELOPER = (
    "{# Written by a developer. #}{% for m in messages %}"
    "{% if m.role in ['system', 'user'] %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
)
REFUSES_DEVELOPER = (
    "{% for m in messages %}{% if m.role not in ['system', 'user'] %}"
    "{{ raise_exception('no role developer') }}{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"
)
TITLES = (
    "The developer says: {% for m in messages %}{{ m.role | title }}:{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (KNOWS_DEVELOPER, "[rule]be brief"),
        ("{# No developer. #}" + KNOWS_DEVELOPER, "[rule]be brief"),
        (DROPS_DEVELOPER, "system:be brief"),
        (REFUSES_DEVELOPER, "system:be brief"),
        (TEMPLATE_WITH_SWITCH, "system:be brief"),
        ("{# Not for a developer. #}" + TEMPLATE_WITH_SWITCH, "system:be brief"),
        (TITLES, "The developer says: System:be brief"),
    ],
    ids=["knows", "knows, with a comment", "drops", "refuses", "copies", "copies 2", "copies 3"],
)
def test_a_developer_is_the_system_where_the_template_does_not_know_it(
    http, engine, tokenizer, monkeypatch, template, begins
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    told = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert chat(http, *told).is_success
    assert prompt_of(engine, tokenizer).startswith(begins)


@pytest.mark.parametrize(
    "expression",
    [
        "range(n)",
        "n // 0",
        "n % 0",
        "10.0 ** n",
        "'%d' % messages",
        "n.no_such()",
        "messages[9].content",
        "messages | sum",
        "raise_exception(messages[0].content * 1000)",
        "raise_exception('')",
    ],
)
def test_what_a_template_raises_refuses_the_messages(
    http, engine, tokenizer, monkeypatch, expression
):
    source = "{% for x in [1] %}{{ " + expression + " }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", source)
    answer = chat(http, {"role": "user", "content": "h\ni"}, chat_template_kwargs={"n": 10**9})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert error["message"].startswith("the chat template refused the messages: ")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert not engine.submissions


def test_the_template_is_told_what_the_request_says(http, engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE_WITH_SWITCH)
    hi = {"role": "user", "content": "hi", "reasoning_content": "hm"}
    chat(http, hi, chat_template_kwargs={"enable_thinking": False, "unknown": [1]})
    assert prompt_of(engine, tokenizer) == "user:hihm;no thinking>"
    chat(http, hi, reasoning_effort="none")
    assert prompt_of(engine, tokenizer) == "user:hihm;no thinking>"
    chat(http, hi, add_generation_prompt=False)
    assert prompt_of(engine, tokenizer) == "user:hihm;"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "messages", "conversation"])
def test_a_request_does_not_take_over_the_rendering(http, name):
    answer = chat(http, {"role": "user", "content": "x"}, chat_template_kwargs={name: "x"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"chat_template_kwargs.{name}"


def test_a_message_that_goes_on(http, engine, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello w"}]
    answer = chat(http, *turns, continue_final_message=True, echo=True, max_tokens=1)
    assert answer.status_code == 200, answer.text
    assert prompt_of(engine, tokenizer).endswith("assistant\nhello w")
    assert answer.json()["choices"][0]["message"]["content"].startswith("hello w")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert chat(http, *turns, **both).status_code == 400


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": ["text"]}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": {"text": "x"}},
        {"role": "user", "content": [None]},
        {"role": ["user"], "content": "x"},
        {"role": "user", "content": "x", "name": 5},
        {},
    ],
)
def test_what_would_change_the_answer_is_refused(http, engine, message):
    answer = chat(http, message)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages.0")
    assert not engine.submissions


@pytest.mark.parametrize("message", ["hi", 5, None, ["user", "hi"]])
def test_a_message_is_an_object(http, message):
    assert chat(http, message).status_code == 400
