"""The peer of `bench throughput`: transformers' continuous batching, in a process of its own.

Run as `python -m revivemoe.bench.peer MODEL_DIR DTYPE PROMPTS_JSON LENGTH...`; prints, for each
length, the seconds that `generate_batch` took for all prompts, warm.
"""

import json
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    """Time each output length once, after a warm-up of the first."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model_dir, dtype, prompts_file, *lengths = argv
    prompts = json.loads(Path(prompts_file).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    model.to(device).eval()

    def seconds(length: int) -> float:
        config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1)
        began = time.monotonic()
        outputs = model.generate_batch(prompts, generation_config=config)
        took = time.monotonic() - began
        produced = [len(o.generated_tokens) for o in outputs.values()]
        assert produced == [length] * len(prompts), f"generated {produced}, wanted {length} each"
        return took

    seconds(int(lengths[0]))
    result = {length: seconds(int(length)) for length in lengths}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
