"""docs/models.md: what became of every family."""

from collections.abc import Iterable
from pathlib import Path

import transformers
from support.families import LIMITS, PROMPT_LENS, Verdict

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_HEAD = """\
# Models

Written by `make test-models`, which makes a tiny checkpoint of every causal language model with
experts in `transformers` {version}, loads it as a rank does, and compares greedy tokens and all
logits of two prompts ({lengths} tokens, chunks of {chunk}, float32) with `transformers`. What is
refused is refused when the server starts, with this line. The weights are random: nothing here
says how well a published checkpoint answers, only that it is computed as `transformers` computes
it.

*masked*: the router can leave experts out, so that a recovery may go on without some of them;
otherwise they are loaded again, or the instance restarts.

{equal} of {all} are served as `transformers` does, {refused} are refused.

## Served

| `model_type` | class | masked |
|---|---|---|
"""

_REFUSED = """
## Refused

| `model_type` | class | why |
|---|---|---|
"""

_FOOT = """
## What depends on more than the family

* **Tying.** As `transformers`: `tie_word_embeddings` beside a head of its own that differs leaves
  it alone; either of the two may be absent. A head or embeddings that nothing fills end the start
  (`transformers` would draw random numbers).
* **End of text.** The ids of `generation_config.json`, else of `config.json`; the tokenizer's own
  `eos_token_id` besides (as vLLM); a request's `stop_token_ids`. Ids beyond the vocabulary are
  dropped with a warning.
* **Flags of training** in `config.json` (`output_router_logits`, `output_hidden_states`,
  `return_dict`, `use_cache`, ...) are ignored.
* **Rope scaling.** `linear`, `yarn` and `llama3` hold for every position alone. `dynamic` and
  `longrope` turn *all* positions by other angles once the longest text of a batch is beyond the
  original length: one request would change another's numbers. They are served up to that length,
  where `transformers` gives the same, and a greater `--max-model-len` is refused. With `yarn` it
  may be as large as the original length times the factor.
* **Sliding windows** are honoured layer by layer. A window that the model keeps to itself (in its
  mask only) is refused, unless it is as long as a text may be.
* **Types.** float32, bfloat16 and float16. Float8 weights with a scale for each block, row or
  tensor (DeepSeek's and Qwen's block FP8, compressed-tensors) are served with `--dequantize`, which
  turns them back into `--dtype` on load: at that type's size in memory. All else that is quantised
  is refused.
* **Where it lies.** A directory, or `ORG/NAME` (with `--revision`) of the Hugging Face hub: its
  safetensors, configuration and tokenizer are fetched into the hub's cache, or taken from there.
  `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_ENDPOINT` count. A configuration that is not
  served is refused before the weights are fetched.
* **Code of a checkpoint's own** (`trust_remote_code`) is not run.
"""


def page(verdicts: Iterable[Verdict]) -> str:
    listed = list(verdicts)
    equal = [v for v in listed if v.equal]
    refused = [v for v in listed if v.refusal]
    head = _HEAD.format(
        version=transformers.__version__,
        lengths=" and ".join(map(str, PROMPT_LENS)),
        chunk=LIMITS.max_num_batched_tokens,
        equal=len(equal),
        all=len(listed),
        refused=len(refused),
    )
    served = [f"| {v.name} | {v.class_name} | {'yes' if v.maskable else 'no'} |\n" for v in equal]
    others = [f"| {v.name} | {v.class_name} | {v.refusal} |\n" for v in refused]
    return "".join([head, *served, _REFUSED, *others, _FOOT])
