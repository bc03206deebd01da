"""The GPU of a thread: a new one begins with the first, and would take memory there."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def on_device(device: str, act: Callable[P, T]) -> Callable[P, T]:
    """`act`, for another thread."""

    def acting(*args: P.args, **kwargs: P.kwargs) -> T:
        use_device(device)
        return act(*args, **kwargs)

    return acting


def use_device(device: str) -> None:
    """Of this thread."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)
