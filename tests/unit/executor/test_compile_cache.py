"""A folder for compiled code is nobody else's, and of those that come at once one fills it."""

import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from revivemoe.executor import compile_cache as module
from revivemoe.executor.compile_cache import VARIABLE, compile_cache


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture
def small_files() -> Iterator[None]:
    """As on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def used() -> Path:
    return Path(os.environ[VARIABLE])


def test_the_first_folder_is_made_and_kept(tmp_path: Path) -> None:
    with compile_cache([tmp_path / "a" / "b", tmp_path / "c"]) as said:
        assert said == ""
        assert used() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
    assert not (tmp_path / "c").exists()


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    with compile_cache([tmp_path / "theirs", tmp_path / "mine"]) as said:
        assert (said, used()) == ("", tmp_path / "mine")
    with compile_cache([tmp_path / "theirs"]) as said:
        assert "theirs can be written to by others" in said
        assert not used().is_relative_to(tmp_path)
    assert not used().exists(), "it goes when compiling is done"


def test_a_link_to_one_is_not_used_either(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with compile_cache([tmp_path / "link"]) as said:
        assert "kept nowhere" in said


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with compile_cache([tmp_path / "file"]) as said:
        assert "kept nowhere" in said
        assert "file" in said


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with compile_cache([tmp_path / "full"]) as said:
        assert "kept nowhere: [Errno 27] File too large" in said


def test_of_those_that_come_at_once_one_is_alone_and_the_others_follow(tmp_path: Path) -> None:
    """The others find what the first has made, and need not wait for each other."""
    present, most, together = set[int](), list[int](), threading.Event()

    def enter(number: int) -> None:
        with compile_cache([tmp_path / "cache"]):
            present.add(number)
            most.append(len(present))
            if number:
                together.wait(5)
            else:
                time.sleep(0.3)
            present.discard(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(3)]
    threads[0].start()
    time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 5
    while len(most) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    together.set()
    for thread in threads:
        thread.join(5)
    assert most == [1, 1, 2]


def test_who_does_not_end_is_not_waited_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are locks of the compiler's own in there."""
    monkeypatch.setattr(module, "WITHIN_S", 0.2)
    with compile_cache([tmp_path / "cache"]), compile_cache([tmp_path / "cache"]) as said:
        assert "kept nowhere: another process holds" in said
        assert not used().is_relative_to(tmp_path)


def test_a_folder_that_others_can_exchange_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    with compile_cache([tmp_path / "theirs" / "graphs"]) as said:
        assert "can be exchanged by others" in said
    (tmp_path / "theirs").chmod(0o1777)  # as /tmp
    with compile_cache([tmp_path / "theirs" / "graphs"]) as said:
        assert said == ""


def test_without_any_place_it_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nowhere"), compile_cache([tmp_path / "file"]):
        pass
