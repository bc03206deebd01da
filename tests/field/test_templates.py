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


def test_a_template_that_cannot_be_used_is_one_line(tmp_path):
    path = tmp_path / "t.jinja"
    with pytest.raises(ValueError, match="cannot be read"):
        read_template(str(path))
    path.write_text("{% if %}")
    with pytest.raises(ValueError, match="no Jinja template") as error:
        read_template(str(path))
    assert "\n" not in str(error.value)
    path.write_text(
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
    )
    assert "loop.first" in read_template(str(path))


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
    assert (said.repetition_penalty, said.max_tokens) == (1.1, 5)
    assert (overruled.temperature, overruled.top_k, overruled.top_p) == (0, 0, 0.9)
    assert chat.max_tokens == 5
