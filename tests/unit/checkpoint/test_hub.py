"""Models of the hub: fetched whole, from the cache where they are, and refused in one line."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.hub import COMMIT, MODEL, hub

from revivemoe.checkpoint.hub import (
    _refuse_partial,
    _remove_stale,
    is_hub_id,
    local_directory,
)

FETCH = """
import sys
from revivemoe.checkpoint.hub import local_directory
for asked in sys.argv[1:]:
    try:
        print(local_directory(*asked.split("@")))
    except ValueError as error:
        print("refused:", error)
"""
NOWHERE = "http://127.0.0.1:9"
OTHER = "acme/other"


def start(cache: Path, endpoint: str, *asked: str, **variables: str) -> subprocess.Popen[str]:
    """Fetches one after another (MODEL or MODEL@REVISION)."""
    left = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = left | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint} | variables
    command = [sys.executable, "-c", FETCH, *asked]
    out = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=out, stderr=out, text=True)


def fetched(cache: Path, endpoint: str, *asked: str, **variables: str) -> list[str]:
    """What was said to each; last of all what was shown meanwhile."""
    process = start(cache, endpoint, *asked, **variables)
    out, shown = process.communicate(timeout=60)
    lines = out.splitlines()
    assert len(lines) == len(asked), out + shown
    return [*lines, shown]


@pytest.fixture
def published(made: dict[str, Path], tmp_path: Path) -> Path:
    """With other formats beside the one that is read."""
    path = Path(shutil.copytree(made["qwen3_moe"], tmp_path / "published"))
    (path / "original").mkdir()
    for other in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        (path / other).write_bytes(b"x")
    return path


def test_from_a_fetch_that_is_killed_to_a_cache_without_a_hub(
    published: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with hub(published, chunk_pause_s=1.0) as served:
        process = start(cache, served.url, MODEL)
        while not any(n.endswith(".safetensors") for n in served.fetched):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
    asked = (MODEL, f"{MODEL}@v2", OTHER)
    for told in fetched(cache, NOWHERE, *asked)[:3]:
        assert "is no directory here, and as a model of the hub it is not, or not whole" in told
        assert f"({NOWHERE}) cannot be reached: ConnectError" in told
    with hub(published, ("main", "v2")) as served:
        told, again, absent, other, shown = fetched(
            cache, served.url, MODEL, f"{MODEL}@v2", f"{MODEL}@v3", OTHER
        )
        assert told == again
        assert told.endswith(f"/snapshots/{COMMIT}")
        assert "Fetching" in shown
        assert "v3" in absent
        assert "RevisionNotFound" in absent
        assert "RepositoryNotFound" in other
        assert len(set(served.fetched)) == len(served.fetched), "once for both names"
        there = {p.name for p in Path(told).iterdir()}
        wanted = {
            p.name for p in published.iterdir() if p.suffix in (".json", ".jinja", ".safetensors")
        }
        assert there == wanted - {"consolidated.safetensors"}
    (folder := next(cache.glob("hub/models--*/refs")) / "feature").mkdir()
    (folder / "x").write_text(COMMIT)
    asked = (*asked, *(f"{MODEL}@{name}" for name in ("feature/x", "feature", "feature/x/y", "")))
    offline = fetched(cache, NOWHERE, *asked, HF_HUB_OFFLINE="1")
    assert [offline[n] for n in (0, 1, 3)] == [told] * 3
    for line in (offline[2], *offline[4:6]):
        assert "is no directory here, and as a model of the hub it is not, or not whole" in line
        assert "HF_HUB_OFFLINE is set" in line
    assert OTHER in offline[2]
    assert "revision feature is" in offline[4]
    assert "revision feature/x/y is" in offline[5]
    assert "--revision is empty" in offline[6]


@pytest.mark.parametrize("error", [IsADirectoryError, NotADirectoryError])
def test_a_revision_that_the_cache_has_for_a_folder(
    error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error(21, "refs/feature")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=f"{MODEL} at revision feature .* cannot be reached$"):
        local_directory(MODEL, "feature")


def test_refused_before_its_weights_are_fetched(published: Path, tmp_path: Path) -> None:
    path = published / "config.json"
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with hub(published) as served:
        told = fetched(tmp_path / "cache", served.url, MODEL)[0]
        assert "is quantised (fp8): --dequantize turns" in told
        assert not [n for n in served.fetched if n.endswith(".safetensors")]


def test_what_an_interrupted_fetch_has_left_goes_a_day_later(tmp_path: Path) -> None:
    old, new, whole = (tmp_path / n for n in ("a.1.incomplete", "a.2.incomplete", "b"))
    for file in (old, new, whole):
        file.write_bytes(b"x")
    for file in (old, whole):
        os.utime(file, (1000, 1000))
    _remove_stale(tmp_path, 2000)
    assert {p.name for p in tmp_path.iterdir()} == {new.name, whole.name}


def test_a_cache_without_the_hubs_list_of_files_may_be_partial(
    published: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(published, snapshot)
    _refuse_partial(snapshot, MODEL, None)
    lost = sorted(snapshot.glob("model-*.safetensors"))[0]
    lost.unlink()
    (tmp_path / "trees").mkdir()
    listed = tmp_path / "trees" / f"{COMMIT}.json"
    unreadable = ("", "{", "[]", "{}", "\0", '{"files": 7}', "[" * 10**5)
    whole = json.dumps({"format_version": 1, "files": {lost.name: {"size": 1, "blob_id": ""}}})
    for text in (None, *unreadable, whole):
        if text is not None:
            listed.write_text(text)
        with pytest.raises(ValueError, match=f"not whole in the cache .* lacks {lost.name}"):
            _refuse_partial(snapshot, MODEL, None)
    listed.write_text(json.dumps({"format_version": 1, "files": {"pytorch_model.bin": {}}}))
    _refuse_partial(snapshot, MODEL, None)  # what is wrong there is no matter of the cache


def test_a_cache_that_lacks_the_index_is_partial(published: Path, tmp_path: Path) -> None:
    """It was taken for a checkpoint in another format, which is to be converted."""
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(published, snapshot)
    index = "model.safetensors.index.json"
    listed = tmp_path / "trees" / f"{COMMIT}.json"
    listed.parent.mkdir()
    files = {path.name: {} for path in snapshot.iterdir()}
    listed.write_text(json.dumps({"format_version": 1, "files": files}))
    (snapshot / index).unlink()
    with pytest.raises(ValueError, match=f"not whole in the cache .* lacks {index}"):
        _refuse_partial(snapshot, MODEL, None)


def test_names() -> None:
    for name in ("Qwen/Qwen3-30B-A3B", "a/b", "deepseek-ai/DeepSeek-V3.1_x"):
        assert is_hub_id(name)
    for name in ("/a/b", "./a", "../b", "a", "a/b/c", "~/b", "a/", "/b", "a/b\n", ".a/b"):
        assert not is_hub_id(name), name


def test_a_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny-moe").mkdir(parents=True)
    assert local_directory(MODEL) == Path(MODEL)
    with pytest.raises(ValueError, match="is a local directory, which has no revisions"):
        local_directory(MODEL, "main")
    with pytest.raises(ValueError, match=r"is no id of the hub \(ORG/NAME\)"):
        local_directory("/nowhere", "main")
