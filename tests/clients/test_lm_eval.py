"""`lm-eval`: log-likelihoods are the sums of our own echo log-probabilities; answers are ours."""

import json
from collections.abc import Sequence
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
ROLLING = """output_type: loglikelihood_rolling
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TEXTS = [{"q": "Two and two is four"}, {"q": "When a device fails, we go on without it. " * 120}]
WINDOW = 2046
"""Of the client's 2048 tokens: one to begin with, and one to generate."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "tiny_choices", CHOICES, QUESTIONS)
    write_task(folder, "tiny_answers", ANSWERS, QUESTIONS)
    write_task(folder, "tiny_texts", ROLLING, TEXTS)
    return folder


def write_task(folder: Path, name: str, kind: str, documents: Sequence[dict[str, Any]]) -> None:
    data = folder / f"{name}.json"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)


def score(served: Served, question: str, choice: str) -> tuple[float, bool]:
    """Of a choice behind a question: its log-probability, and whether greedy would have said it."""
    scored = served.complete(question + choice, echo=True, logprobs=1, max_tokens=0)
    told = scored["choices"][0]["logprobs"]
    begin = len(served.tokens(question))
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


def rolling_score(served: Served, text: str, begin: int) -> float:
    """Of a whole text, window by window, each behind as many tokens as there is room for."""
    ids = [begin, *served.tokens(text)]
    total = 0.0
    for at in range(1, len(ids), WINDOW):
        end = min(at + WINDOW, len(ids))
        prompt = ids[max(0, end - WINDOW - 1) : end]
        scored = served.complete(prompt, echo=True, logprobs=1, max_tokens=0)["choices"][0]
        total += sum(scored["logprobs"]["token_logprobs"][at - end :])
    return total


def test_texts_longer_than_the_context(served: Served, tasks: Path) -> None:
    """The windows fill the context to its last token."""
    more = {"tokenizer": str(served.model_dir), "tokenizer_backend": "huggingface"}
    given = ["local-completions", COMPLETIONS, "tiny_texts", str(tasks), json.dumps(more)]
    found = run_client("lm_eval_client", served, *given)
    assert len(served.tokens(TEXTS[1]["q"])) > WINDOW
    config = json.loads((served.model_dir / "generation_config.json").read_text())
    for text, responses in zip(TEXTS, found["responses"], strict=True):
        expected = rolling_score(served, text["q"], config["bos_token_id"])
        assert responses[0][0] == pytest.approx(expected, rel=1e-5)
    assert found["metrics"]["bits_per_byte,none"] > 0


def test_chat_answers(served: Served, tasks: Path) -> None:
    given = ["local-chat-completions", CHAT, "tiny_answers", str(tasks), "{}"]
    found = run_client("lm_eval_client", served, *given)
    plain = [served.chat(str(one["q"]), stop=["\n\n"]) for one in QUESTIONS]
    expected = [one["choices"][0]["message"]["content"] for one in plain]
    assert [responses[0][0] for responses in found["responses"]] == expected


def test_answers_of_completions(served: Served, tasks: Path) -> None:
    more = {"tokenizer": str(served.model_dir), "tokenizer_backend": "huggingface"}
    given = ["local-completions", COMPLETIONS, "tiny_answers", str(tasks), json.dumps(more)]
    found = run_client("lm_eval_client", served, *given)
    plain = [served.complete(str(one["q"]), stop=["\n\n"]) for one in QUESTIONS]
    expected = [one["choices"][0]["text"] for one in plain]
    assert [responses[0][0] for responses in found["responses"]] == expected
