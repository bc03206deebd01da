"""Every thread that touches a GPU says which one; on a CPU nobody does."""

import threading

import pytest
import torch

from revivemoe.host.cuda_thread import on_device


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which device, in which thread: there is no GPU here."""
    calls: list[tuple[str, str]] = []

    def set_device(device: str) -> None:
        calls.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return calls


def add(one: int, other: int = 0) -> int:
    return one + other


def test_a_thread_says_its_device_first(said: list[tuple[str, str]]) -> None:
    sums: list[int] = []
    act = on_device("cuda:3", lambda: sums.append(add(1, other=2)))
    thread = threading.Thread(target=act, name="aside")
    thread.start()
    thread.join(5)
    assert (said, sums) == ([("aside", "cuda:3")], [3])


def test_what_it_returns_comes_back(said: list[tuple[str, str]]) -> None:
    assert on_device("cuda:1", add)(1, other=2) == 3
    assert said


def test_there_is_nothing_to_say_on_a_cpu(said: list[tuple[str, str]]) -> None:
    assert on_device("cpu", add)(2) == 2
    assert not said
