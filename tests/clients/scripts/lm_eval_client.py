"""`lm-eval`: scores the choices of one task, or writes the answers of another."""

import contextlib
import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL, KIND, ENDPOINT, TASK, FOLDER, OPTIONS = sys.argv[1:]
"""Kind: `local-completions` or `local-chat-completions`; options: more model arguments, in JSON."""


def main():
    arguments = {
        "model": MODEL,
        "base_url": URL + ENDPOINT,
        "max_retries": 1,
        **json.loads(OPTIONS),
    }
    with contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            model=KIND,
            model_args=arguments,
            tasks=[TASK],
            task_manager=TaskManager(include_path=FOLDER),
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template="chat" in KIND,
        )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    found = {
        "responses": [sample["resps"] for sample in samples],
        "kept": [sample["filtered_resps"] for sample in samples],
        "metrics": {k: v for k, v in results["results"][TASK].items() if "," in k},
    }
    print(json.dumps(found))


main()
