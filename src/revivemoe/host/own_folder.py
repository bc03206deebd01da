"""Folders for what is built once: nobody else's, and one builder at a time."""

import fcntl
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from os import getuid
from pathlib import Path

LOOK_S = 0.05
OTHERS = stat.S_IWGRP | stat.S_IWOTH


def own_folder(folder: Path) -> Path:
    """The folder, made if need be, without links on the way. Raises OSError where somebody else
    could put something into it, or another one in its place.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    of_folder = folder.lstat()
    if of_folder.st_uid != getuid() or of_folder.st_mode & OTHERS:
        raise PermissionError(f"{folder} can be written to by others")
    for parent in folder.parents:
        of_parent = parent.lstat()
        theirs = of_parent.st_uid not in (getuid(), 0)
        if theirs or (of_parent.st_mode & OTHERS and not of_parent.st_mode & stat.S_ISVTX):
            raise PermissionError(f"{folder} can be exchanged by others, who may change {parent}")
    return folder


@contextmanager
def locked(lock: Path, within_s: float) -> Iterator[bool]:
    """The lock goes with the process that holds it. Gives whether another one held it before.
    Raises TimeoutError, OSError.
    """
    deadline, waited = time.monotonic() + within_s, False
    with open(lock, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {lock} and does not end") from None
                waited = True
                time.sleep(LOOK_S)
        yield waited
