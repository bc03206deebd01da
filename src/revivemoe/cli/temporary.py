"""A directory for temporary files, where the root file system is read-only.

torch wants to know one when it is imported, though nothing here is written to it.
"""

import os
import tempfile

LAST_RESORT = "/dev/shm"


def find_temporary_directory() -> None:
    """For this process and those it starts. Raises ValueError if there is none."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(LAST_RESORT, os.W_OK):
            raise ValueError(
                f"neither /tmp nor {LAST_RESORT} can be written: set TMPDIR to a directory that can"
            ) from None
        os.environ["TMPDIR"] = LAST_RESORT
