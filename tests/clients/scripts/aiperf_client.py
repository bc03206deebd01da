"""`aiperf`, the load generator: a few streams at once, and what it reports of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

URL, MODEL, KIND, TOKENIZER, HUB_HOME, FOLDER = sys.argv[1:]
"""Kind: `chat` or `completions`; tokenizer: a name in the hub's cache of that home."""
NUM_REQUESTS, NUM_TOKENS = 12, 16
OUT = Path(FOLDER)


def profile():
    fields = {
        "--model": MODEL, "--url": URL, "--endpoint-type": KIND, "--api-key": "the-key",
        "--tokenizer": TOKENIZER, "--isl": 30, "--isl-stddev": 0, "--osl": NUM_TOKENS,
        "--osl-stddev": 0, "--request-count": NUM_REQUESTS, "--concurrency": 4,
        "--export-level": "raw", "--ui": "none", "--random-seed": 1, "--artifact-dir": OUT,
    }  # fmt: skip
    extra = ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"]
    program = [str(Path(sys.executable).with_name("aiperf")), "profile"]
    given = [str(word) for pair in fields.items() for word in pair]
    flags = ["--streaming", "--use-server-token-count", *extra]
    subprocess.run(
        [*program, *given, *flags], check=True, stdout=sys.stderr,
        env={**os.environ, "HF_HOME": HUB_HOME},
    )  # fmt: skip


def answered(record):
    """What was asked, and the text and the usage that came."""
    packets = [packet for answer in record["responses"] for packet in answer["packets"]]
    data = [p["value"] for p in packets if p["name"] == "data" and p["value"] != "[DONE]"]
    chunks = [json.loads(value) for value in data]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [c["delta"].get("content") if "delta" in c else c["text"] for c in choices]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    text = "".join(part or "" for part in parts)
    return {"asked": record["payload"], "text": text, "usages": usages, "status": record["status"]}


def main():
    profile()
    report = json.loads((OUT / "profile_export_aiperf.json").read_text())
    lines = (OUT / "profile_export_raw.jsonl").read_text().splitlines()
    averages = {k: v["avg"] for k, v in report.items() if isinstance(v, dict) and "avg" in v}
    scraped = json.loads((OUT / "server_metrics_export.json").read_text())["metrics"]
    found = {
        "averages": averages, "errors": report["error_summary"],
        "answers": [answered(json.loads(line)) for line in lines], "scraped": sorted(scraped),
    }  # fmt: skip
    print(json.dumps(found))


main()
