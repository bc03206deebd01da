"""`aiperf`, a load generator for vLLM's API: every stream is counted, whole and ours."""

from pathlib import Path

import pytest
from support.served import CHAT, COMPLETIONS, Served, run_client

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("libraries")]

NAME = "local/tiny-moe"
"""Offline, aiperf takes a tokenizer from the hub's cache alone, not from a folder."""


def cached(model_dir: Path, home: Path) -> None:
    """A cache of the hub that holds this checkpoint."""
    folder = home / "hub" / f"models--{NAME.replace('/', '--')}"
    revision = "0" * 39 + "1"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / revision).symlink_to(model_dir)


@pytest.mark.parametrize(("kind", "path"), [("chat", CHAT), ("completions", COMPLETIONS)])
def test_a_load(served: Served, kind: str, path: str, tmp_path: Path) -> None:
    home, out = tmp_path / "hub-home", tmp_path / "out"
    cached(served.model_dir, home)
    found = run_client("aiperf_client", served, kind, NAME, str(home), str(out))
    averages, answers = found["averages"], found["answers"]
    assert found["errors"] == []
    assert (averages["completed_request_count"], averages["request_error_rate"]) == (12, 0)
    assert averages["total_usage_completion_tokens"] == 12 * 16
    assert 0 < averages["time_to_first_token"] < averages["request_latency"]
    assert "revivemoe_generation_tokens" in found["scraped"]
    assert len(answers) == 12
    for answer in answers:
        asked = {k: v for k, v in answer["asked"].items() if not k.startswith("stream")}
        plain = served.post(path, **asked)
        choice = plain["choices"][0]
        text = choice["message"]["content"] if kind == "chat" else choice["text"]
        assert (answer["text"], answer["usages"]) == (text, [plain["usage"]])
