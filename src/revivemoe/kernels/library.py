"""Builds `kernels.cpp` on first use and opens it. Once for each source, compiler and processor.

Not by `torch.utils.cpp_extension`: its lock is a file that outlives whoever is killed while it
builds, and all who come later wait for it without end; and torch's headers cost half a minute.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

logger = logging.getLogger("revivemoe.kernels")

SOURCE = Path(__file__).with_name("kernels.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
VERSION = 1
_Argument = c_void_p | c_int64 | c_int | c_float
BUILT_WITHIN_S = 120.0
"""Twenty times what it takes; another process's build is waited for as long."""


class NoKernels(Exception):
    """They cannot be had here; the message says why, in one line."""


def open_library() -> ctypes.CDLL:
    """Build if need be, and load. Raises NoKernels. The first answer is kept."""
    found = _opened()
    if isinstance(found, str):
        raise NoKernels(found)
    return found


@cache
def _opened() -> ctypes.CDLL | str:
    try:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise NoKernels(f"there are none for {platform.machine()}")
        compiler = _compiler()
        path = _folder() / f"kernels-{_key(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        library = ctypes.CDLL(str(path))
        if library.rv_version() != VERSION:
            raise NoKernels(f"{path} is of another version: remove it")
        return library
    except (OSError, AttributeError) as error:
        return " ".join(str(error).split())[:300]
    except NoKernels as error:
        return str(error)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise NoKernels("no C++ compiler: install g++, or set CXX")


def _key(compiler: str) -> str:
    """Of all that decides what is built."""
    of_file = os.stat(compiler)
    parts = (
        *(path.read_bytes() for path in SOURCES), " ".join(FLAGS).encode(), compiler.encode(),
        f"{of_file.st_size} {of_file.st_mtime_ns}".encode(), _processor(),
    )  # fmt: skip
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> bytes:
    """What `-march=native` goes by."""
    with open("/proc/cpuinfo", "rb") as file:
        lines = [line for line in file if line.startswith((b"model name", b"flags"))]
    return b"".join(sorted(set(lines)))


def _folder() -> Path:
    """Where builds are kept: a folder that nobody else can write to. Raises NoKernels."""
    named = os.environ.get("REVIVEMOE_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    in_tmp = Path(tempfile.gettempdir()) / f"revivemoe-{os.getuid()}"
    tried = [Path(named)] if named else [Path(home) / "revivemoe", in_tmp]
    why = ""
    for folder in tried:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            of_folder = folder.stat()
        except OSError as error:
            why = str(error)
            continue
        others = stat.S_IWGRP | stat.S_IWOTH
        if of_folder.st_uid != os.getuid() or of_folder.st_mode & others:
            why = f"{folder} can be written to by others"
        elif not os.access(folder, os.W_OK | os.X_OK) and not any(folder.glob("kernels-*.so")):
            why = f"{folder} cannot be written to"
        else:
            return folder
    raise NoKernels(f"no folder to build them in (REVIVEMOE_CACHE_DIR names one): {why}")


def _build(compiler: str, path: Path) -> None:
    """Raises NoKernels, OSError. What is there under its name is whole."""
    with _alone(path.with_suffix(".lock")):
        if path.exists():
            return
        logger.info("building kernels for this processor, once: a few seconds")
        part = path.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run(
                [compiler, *FLAGS, "-o", str(part), str(SOURCE)],
                check=True, capture_output=True, timeout=BUILT_WITHIN_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            part.replace(path)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").split("\n")
            said = next((line for line in lines if "error" in line), lines[0])
            raise NoKernels(f"{compiler} failed: {said.strip()[:200]}") from None
        except subprocess.TimeoutExpired:
            raise NoKernels(f"{compiler} took longer than {BUILT_WITHIN_S:g} s") from None
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """The lock goes with the process that holds it. Raises NoKernels after `BUILT_WITHIN_S`."""
    deadline = time.monotonic() + BUILT_WITHIN_S
    with open(lock, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NoKernels(
                        f"another process builds them and does not end: {lock}"
                    ) from None
                time.sleep(0.05)
        yield


def function_of(
    library: ctypes.CDLL, name: str, arguments: str, result: type[c_int64] | None = None
) -> Callable[..., int]:
    """`arguments`: p pointer, i int64, b int, f float. Calls release the GIL."""
    kinds: dict[str, type[_Argument]] = {"p": c_void_p, "i": c_int64, "b": c_int, "f": c_float}
    function = library[name]
    function.argtypes = [kinds[letter] for letter in arguments]
    function.restype = result
    return function


if __name__ == "__main__":
    try:
        print(open_library()._name)
    except NoKernels as missing:
        sys.exit(f"no kernels: {missing}")
