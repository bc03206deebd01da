"""The built `kernels.cpp`, opened: `cluster.compiler` builds it before ranks are forked."""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
VERSION = 1
_Argument = c_void_p | c_int64 | c_int | c_float


class NoKernels(Exception):
    """They cannot be had here; the message says why, in one line."""


@dataclass
class _Built:
    found: ctypes.CDLL | str = "nobody has built them"


_built = _Built()
"""Of this process, and of all that it forks."""


def use(path: Path) -> None:
    """What `open_library` returns from here on. Raises NoKernels for what is no such library."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.rv_version()
    except (OSError, AttributeError) as error:
        raise NoKernels(" ".join(str(error).split())[:300]) from None
    if version != VERSION:
        raise NoKernels(f"{path} is of another version: remove it")
    _built.found = library


def do_without(why: str) -> None:
    """From here on `open_library` raises NoKernels with this line."""
    _built.found = why


def open_library() -> ctypes.CDLL:
    """Raises NoKernels."""
    if isinstance(_built.found, str):
        raise NoKernels(_built.found)
    return _built.found


def function_of(
    library: ctypes.CDLL, name: str, arguments: str, result: type[c_int64] | None = None
) -> Callable[..., int]:
    """`arguments`: p pointer, i int64, b int, f float. Calls release the GIL."""
    kinds: dict[str, type[_Argument]] = {"p": c_void_p, "i": c_int64, "b": c_int, "f": c_float}
    function = library[name]
    function.argtypes = [kinds[letter] for letter in arguments]
    function.restype = result
    return function
