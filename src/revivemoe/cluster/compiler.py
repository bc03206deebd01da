"""Builds `kernels.cpp` on first use. Once for each source, compiler and processor.

Not by `torch.utils.cpp_extension`: its lock is a file that outlives whoever is killed while it
builds, and all who come later wait for it without end; and torch's headers cost half a minute.
"""

import hashlib
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from revivemoe.config import cache_folders, compilers
from revivemoe.host.own_folder import locked, own_folder
from revivemoe.kernels.library import SOURCE, SOURCES, NoKernels, do_without, use

logger = logging.getLogger("revivemoe.kernels")

FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
BUILT_WITHIN_S = 40.0
"""Ten times what it takes; another process's build is waited for as long."""


def provide_kernels() -> None:
    """Build if need be, and open: for this process and all that it forks. Where that cannot be,
    `open_library` says why.
    """
    try:
        use(build(cache_folders(), compilers()))
    except OSError as error:
        do_without(" ".join(str(error).split())[:300])
    except NoKernels as error:
        do_without(str(error))


def build(folders: Sequence[Path], names: Sequence[str]) -> Path:
    """The library, built by the first of the compilers that is there, in the first of the folders
    that can be used. Raises NoKernels, OSError.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NoKernels(f"there are none for {platform.machine()}")
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoKernels("no C++ compiler: install g++, or set CXX")
    name, why = f"kernels-{_key(compiler)}.so", "none was named"
    for folder in folders:
        try:
            path = own_folder(folder) / name
            if not path.exists():
                _build(compiler, path)
            return path
        except OSError as error:
            why = str(error)
    raise NoKernels(f"no folder to build them in (REVIVEMOE_CACHE_DIR names one): {why}")


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


def _build(compiler: str, path: Path) -> None:
    """Raises NoKernels, OSError. What is there under its name is whole."""
    try:
        with locked(path.with_suffix(".lock"), BUILT_WITHIN_S):
            _build_alone(compiler, path)
    except TimeoutError as error:
        raise NoKernels(f"nobody has built them: {error}") from None


def _build_alone(compiler: str, path: Path) -> None:
    if path.exists():
        return
    logger.info("building kernels for this processor, once: a few seconds")
    part = path.with_suffix(f".{os.getpid()}")
    try:
        _compile(compiler, part)
        with open(part, "rb") as file:
            os.fsync(file)  # else a power cut leaves an empty file under the name
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _compile(compiler: str, to: Path) -> None:
    """Raises NoKernels. The compiler and what it starts end with us, or by their limit of CPU time
    where we are killed.
    """
    limited = ("/bin/sh", "-c", f'ulimit -t {math.ceil(BUILT_WITHIN_S)}; exec "$0" "$@"')
    process = subprocess.Popen(
        [*limited, compiler, *FLAGS, "-o", str(to), str(SOURCE)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        process_group=0,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=BUILT_WITHIN_S)
    except BaseException as error:
        with suppress(ProcessLookupError):  # waited for already, by an interrupt
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise NoKernels(f"{compiler} took longer than {BUILT_WITHIN_S:g} s") from None
    if process.returncode:
        lines = said.decode(errors="replace").split("\n")
        line = next((line for line in lines if "error" in line), lines[0])
        raise NoKernels(f"{compiler} failed: {line.strip()[:200]}")


if __name__ == "__main__":
    try:
        print(build(cache_folders(), compilers()))
    except (NoKernels, OSError) as missing:
        sys.exit(f"no kernels: {missing}")
