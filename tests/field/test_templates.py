"""`--chat-template` and `--generation-config`."""

import pytest

from revivemoe.sampling_params import SamplingDefaults
from revivemoe.server.template import read_template


def test_a_template_of_the_operators(start_server):
    with start_server(chat_template="{{ messages[0].content }}!") as server, server.http() as http:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert http.post("/v1/chat/completions", json=body).is_success
        (prompt,) = server.engine.submissions[0].prompts
        assert server.engine.tokenizer.decode(prompt) == "hi!"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson }}{{ strftime_now('%Y') }}",
        "{{ raise_exception('not this conversation') }}",
        "{{ undefined.field.of.it }}",
        "\n",
    ],
)
def test_whatever_transformers_renders_is_a_template(tmp_path, source):
    path = tmp_path / "t.jinja"
    path.write_text(source)
    assert read_template(str(path)) == source
    assert read_template(source) == source


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% no_such_tag %}", "{{ a | no_filter }}"])
def test_a_template_that_is_none_is_one_line(tmp_path, source):
    path = tmp_path / "t.jinja"
    path.write_text(source)
    for given in (str(path), source, source + "\n" * 3 + "x" * 10**5):
        with pytest.raises(ValueError, match="is no Jinja template") as error:
            read_template(given)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "latin", "x" * 5000):
        with pytest.raises(ValueError, match="cannot be read") as error:
            read_template(str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


def test_defaults_are_for_what_a_request_does_not_say(http, engine):
    defaults = SamplingDefaults(0.6, 0.9, 20, 0.1, 1.1, 5)
    object.__setattr__(engine.model, "defaults", defaults)
    try:
        http.post("/v1/completions", json={"prompt": "a"})
        http.post("/v1/completions", json={"prompt": "a", "temperature": 0, "top_k": -1})
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    finally:
        object.__setattr__(engine.model, "defaults", SamplingDefaults())
    said, overruled, chat = (s.params for s in engine.submissions)
    assert (said.temperature, said.top_p, said.top_k, said.min_p) == (0.6, 0.9, 20, 0.1)
    assert (said.repetition_penalty, said.max_tokens) == (1.1, 16)
    assert (overruled.temperature, overruled.top_k, overruled.top_p) == (0, 0, 0.9)
    assert chat.max_tokens == 5


def test_a_limit_holds_whatever_is_asked_for(http, engine):
    defaults = SamplingDefaults(max_tokens=5, max_tokens_limit=5)
    object.__setattr__(engine.model, "defaults", defaults)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    try:
        for fields in ({}, {"max_tokens": 3}, {"max_tokens": 9}, {"max_completion_tokens": 9}):
            assert http.post("/v1/completions", json={"prompt": "a", **fields}).is_success
            assert http.post("/v1/chat/completions", json={**chat, **fields}).is_success
        refused = http.post("/v1/completions", json={"prompt": "a", "min_tokens": 6})
    finally:
        object.__setattr__(engine.model, "defaults", SamplingDefaults())
    assert [s.params.max_tokens for s in engine.submissions] == [5, 5, 3, 3, 5, 5, 5, 5]
    assert refused.json()["error"]["param"] == "min_tokens"
