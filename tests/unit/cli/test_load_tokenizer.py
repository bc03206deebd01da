"""The checkpoint's tokenizer, whatever was saved with it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.cli.serve_run import load_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture
def path(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["mixtral"], tmp_path / "model"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def padding(strategy: Any) -> dict[str, Any]:
    fixed = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"}
    return {"strategy": strategy, "direction": "Right", **fixed}


@pytest.mark.parametrize("strategy", ["BatchLongest", {"Fixed": 256}])
def test_it_neither_cuts_nor_pads(path: Path, strategy: Any) -> None:
    plain = load_tokenizer(path).encode(TEXT, add_special_tokens=False)
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(path / "tokenizer.json", truncation=cut, padding=padding(strategy))
    edit(path / "tokenizer_config.json", model_max_length=8)
    tokenizer: Any = load_tokenizer(path)
    # First who asks the backend itself: `encode` would undo what was saved.
    assert tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids == plain
    assert tokenizer.encode(TEXT, add_special_tokens=False) == plain
    assert len(plain) > 8


@pytest.mark.parametrize("where", ["file", "inline", "both"])
def test_a_chat_template_in_a_file_or_inline(path: Path, where: str) -> None:
    file, inline = "file {{ messages[0].content }}", "inline {{ messages[0].content }}"
    (path / "chat_template.jinja").unlink(missing_ok=True)
    if where != "inline":
        (path / "chat_template.jinja").write_text(file)
    if where != "file":
        edit(path / "tokenizer_config.json", chat_template=inline)
    said = [{"role": "user", "content": "hello"}]
    text = load_tokenizer(path).apply_chat_template(said, tokenize=False)
    assert text == f"{'inline' if where == 'inline' else 'file'} hello"


def test_code_of_the_checkpoints_own_is_not_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor asked about: its tokenizer.json is there. The family has no tokenizer of its own."""
    marker = path / "run"
    plain = load_tokenizer(path).encode(TEXT, add_special_tokens=False)
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: ...\n")
    edit(path / "config.json", model_type="granitemoe_swa")
    edit(
        path / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]},
        tokenizer_class="Own",
    )  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))
    assert load_tokenizer(path).encode(TEXT, add_special_tokens=False) == plain
    assert not marker.exists()


def test_the_tokenizers_own_end_ends_a_text_too(path: Path) -> None:
    """As in vLLM: beside those of the generation configuration."""
    edit(path / "config.json", eos_token_id=7)
    edit(path / "generation_config.json", eos_token_id=[9, 8])
    info, tokenizer = inspect_checkpoint(path), load_tokenizer(path)
    end: Any = tokenizer
    assert end.eos_token_id == 2
    assert info.ending_with(end.eos_token_id).eos_token_ids == (9, 8, 2)


@pytest.mark.parametrize("token_id", [None, 9, -1, 512, 10**9])
def test_an_end_that_is_none_or_known_or_nobodys_adds_nothing(
    path: Path, token_id: int | None
) -> None:
    edit(path / "generation_config.json", eos_token_id=[9])
    assert inspect_checkpoint(path).ending_with(token_id).eos_token_ids == (9,)
