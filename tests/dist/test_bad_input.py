"""Bad input at the command line: one line that says what and how to mend it, and status 2."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support.warm import zygote

from revivemoe.checkpoint.make import make_model

AT_ONCE_S = 20.0
"""What needs neither weights nor ranks is refused before anything is started."""
AFTER_LOADING_S = 40.0


def run(*arguments: str | Path, timeout_s: float = AFTER_LOADING_S) -> tuple[int, str, str, float]:
    """Exit status, standard output, standard error, seconds; in a process that is warm already."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = zygote().start([*map(str, arguments)], out.fileno(), err.fileno())
        try:
            status = process.wait(timeout_s)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read(), time.monotonic() - began


def really_run(*arguments: str | Path) -> tuple[int, str, str]:
    """The same from a true command line."""
    command = [sys.executable, "-m", "revivemoe.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=AFTER_LOADING_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


def refusal(*arguments: str | Path) -> str:
    """The one line with which a command line is refused at once."""
    status, out, err, took_s = run(*arguments)
    assert status == 2, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("revivemoe: error: ")
    assert took_s < AT_ONCE_S
    return line


def late_refusal(*arguments: str | Path) -> str:
    """The line of a refusal that only the ranks can find: the last one, after the log's."""
    status, out, err, _ = run(*arguments)
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    *logged, line = err.splitlines()
    assert line.startswith("revivemoe: error: ")
    assert all(" INFO " in text or " ERROR " in text for text in logged), err
    return line


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "model"
    make_model(path, "qwen3_moe", "tiny", 0)
    return path


@pytest.fixture
def spoiled(model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def edit_config(path: Path, **fields: Any) -> None:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


# ---- flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data-parallel-size", "17"], "more ranks than the 16 experts of a layer"),
        (["--data-parallel-size", "0"], "at least 1"),
        (["--redundant-experts", "5"], "--redundant-experts 5 is more than"),
        (["--max-missing-fraction", "1.5"], "0 up to below 1"),
        (["--max-model-len", "5000"], "more than the 4096 positions"),
        (["--max-num-batched-tokens", "8", "--max-num-seqs", "9"], "below --max-num-seqs 9"),
        (["--dtype", "int8"], "choose one of auto, float32, bfloat16"),
        (["--comm-backend", "mpi"], "choose one of auto, shm, gloo, nccl"),
        (["--device", "tpu"], "choose one of auto, cpu, cuda"),
        (["--num-kv-blocks", "0"], "at least 1"),
        (["--port", "70000"], "0 to 65535"),
        (["--expert-ranks", "17"], "more ranks than the 16 experts of a layer"),
        (["--expert-ranks", "-1"], "at least 0"),
        (["--dense-ffn-tp", "2"], "has no dense feed-forward layers"),
        (["--num-microbatches", "9"], "at most 8"),
        (["--recovery-policy", "no-such-policy.toml"], "no-such-policy.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag(model_dir: Path, flags: list[str], says: str) -> None:
    line = refusal("serve", model_dir, "--device", "cpu", "--port", "0", *flags)
    assert flags[0] in line
    assert says in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["serve", "x", "--port", "many"],
        ["serve", "x", "--no-such-flag"],
        ["no-such-command"],
        ["make-model"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_line_at_all(arguments: list[str]) -> None:
    status, out, err, _ = run(*arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) <= 6
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "x", "--port", "70000"],
        ["serve", "nowhere", "--port", "0"],
        ["serve", "x", "--no-such-flag"],
        ["make-model", "x", "--arch", "gpt2"],
    ],
    ids=" ".join,
)
def test_a_true_command_line_says_the_same(arguments: list[str]) -> None:
    status, out, err = really_run(*arguments)
    assert (status, out, err) == run(*arguments)[:3]
    assert status == 2


# ---- checkpoints ----------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    shard = next(iter(sorted(path.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-100])


def drop_shard(path: Path) -> None:
    next(iter(sorted(path.glob("*.safetensors")))).unlink()


def garble_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def quantise(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "fp8"})


def make_dense(path: Path) -> None:
    for old in path.glob("*.safetensors*"):
        old.unlink()
    import torch

    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, path / "model.safetensors")


def drop_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "is not a directory: give a local checkpoint"),
        (garble_config, "config.json cannot be read"),
        (cut_short, "cut short (an interrupted download?)"),
        (drop_shard, "is missing: the checkpoint is incomplete"),
        (quantise, "is quantised (fp8): --dequantize turns its float8 weights back"),
        (make_dense, "no routed experts: only Mixture-of-Experts checkpoints can be served"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_cannot_be_served(
    spoiled: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(spoiled)
    line = refusal("serve", spoiled, "--port", "0")
    assert str(spoiled) in line
    assert says in line


def test_a_checkpoint_without_a_tokenizer(spoiled: Path) -> None:
    drop_tokenizer(spoiled)
    line = late_refusal("serve", spoiled, "--port", "0", "--device", "cpu")
    assert str(spoiled) in line
    assert "tokenizer" in line


def test_an_architecture_transformers_does_not_know(spoiled: Path) -> None:
    edit_config(spoiled, model_type="nobody_knows", architectures=["NobodyKnows"])
    line = late_refusal("serve", spoiled, "--port", "0", "--device", "cpu")
    assert "nobody_knows" in line


# ---- memory, port ---------------------------------------------------------------------------


def test_no_memory_for_the_kv_cache(model_dir: Path) -> None:
    """More cases: tests/unit/executor/test_kv_size.py."""
    flags = ["--device", "cpu", "--num-kv-blocks", "3", "--max-model-len", "512"]
    line = late_refusal("serve", model_dir, "--port", "0", *flags)
    assert "KV cache" in line
    assert "lower --max-model-len, raise --num-kv-blocks" in line


def test_a_port_in_use_is_found_before_anything_is_loaded(model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("serve", model_dir, "--device", "cpu", "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "--port" in line


def test_a_host_that_is_not_ours(model_dir: Path) -> None:
    line = refusal("serve", model_dir, "--device", "cpu", "--host", "192.0.2.1", "--port", "0")
    assert "cannot listen on 192.0.2.1:0" in line


# ---- make-model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--arch", "gpt2"], "choose one of qwen3_moe, mixtral, olmoe, deepseek_v3, glm4_moe"),
        (["--preset", "huge"], "choose one of tiny, small, medium"),
        (["--dtype", "int8"], "choose one of float32, bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_nobody_can_make(tmp_path: Path, flags: list[str], says: str) -> None:
    line = refusal("make-model", tmp_path / "new", *flags)
    assert flags[1] in line
    assert says in line
    assert not (tmp_path / "new").exists()


def test_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    line = refusal("make-model", tmp_path)
    assert "is not an empty directory: choose another or empty it" in line
    assert (tmp_path / "precious").read_text() == "x"


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    status, out, err, _ = run("make-model", tmp_path / "file" / "model")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("revivemoe: error: ")
    assert str(tmp_path / "file") in err.splitlines()[-1]
