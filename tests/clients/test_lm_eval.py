"""`lm-eval`: log-likelihoods are the sums of our own echo log-probabilities; answers are ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.served import CHAT, COMPLETIONS, Served, run_client

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("libraries")]

QUESTIONS = [
    {"q": "When a device fails", "choices": [" it stops", " we go on"], "gold": 1},
    {"q": "Two and two", "choices": [" is four", " is five", " is déjà vu"], "gold": 0},
    {"q": "Once", "choices": [" upon a time", " more"], "gold": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
target_delimiter: ""
"""
CHOICES = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWERS = """output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, ignore_eos: true, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.json"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    for name, kind in (("tiny_choices", CHOICES), ("tiny_answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return folder


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches go into a folder of the test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def num_tokens(served: Served, text: str) -> int:
    return int(served.ask("POST", "/tokenize", json={"prompt": text}).json()["count"])


def score(served: Served, question: str, choice: str) -> tuple[float, bool]:
    """Of a choice behind a question: its log-probability, and whether greedy would have said it."""
    scored = served.complete(question + choice, echo=True, logprobs=1, max_tokens=0)
    told = scored["choices"][0]["logprobs"]
    begin = num_tokens(served, question)
    drawn, tops = told["token_logprobs"][begin:], told["top_logprobs"][begin:]
    return sum(drawn), all(d == max(t.values()) for d, t in zip(drawn, tops, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"tokenized_requests": True, "batch_size": 1},
        {"tokenized_requests": True, "batch_size": 4},
        {"tokenized_requests": False, "num_concurrent": 4},
    ],
    ids=["tokens", "batches of tokens", "text, four at once"],
)
@pytest.mark.usefixtures("hugging_face")
def test_log_likelihoods(served: Served, tasks: Path, options: dict[str, Any]) -> None:
    more = {"tokenizer": str(served.model_dir), "tokenizer_backend": "huggingface", **options}
    given = ["local-completions", COMPLETIONS, "tiny_choices", str(tasks), json.dumps(more)]
    found = run_client("lm_eval_client", served, *given)
    right = 0
    for question, responses in zip(QUESTIONS, found["responses"], strict=True):
        expected = [score(served, str(question["q"]), one) for one in question["choices"]]  # type: ignore[attr-defined]
        got = [response[0] for response in responses]
        assert [g[0] for g in got] == pytest.approx([e[0] for e in expected], abs=1e-3)
        assert [g[1] for g in got] == [e[1] for e in expected]
        likeliest = max(range(len(expected)), key=lambda i: expected[i][0])
        right += likeliest == question["gold"]
    assert found["metrics"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


@pytest.mark.usefixtures("hugging_face")
def test_chat_answers(served: Served, tasks: Path) -> None:
    given = ["local-chat-completions", CHAT, "tiny_answers", str(tasks), "{}"]
    found = run_client("lm_eval_client", served, *given)
    plain = [served.chat(str(one["q"]), stop=["\n\n"]) for one in QUESTIONS]
    expected = [one["choices"][0]["message"]["content"] for one in plain]
    assert [responses[0][0] for responses in found["responses"]] == expected


@pytest.mark.usefixtures("hugging_face")
def test_answers_of_completions(served: Served, tasks: Path) -> None:
    more = {"tokenizer": str(served.model_dir), "tokenizer_backend": "huggingface"}
    given = ["local-completions", COMPLETIONS, "tiny_answers", str(tasks), json.dumps(more)]
    found = run_client("lm_eval_client", served, *given)
    plain = [served.complete(str(one["q"]), stop=["\n\n"]) for one in QUESTIONS]
    expected = [one["choices"][0]["text"] for one in plain]
    assert [responses[0][0] for responses in found["responses"]] == expected
