"""Where what the compiler makes is kept, so that the next process finds it.

What lies there is run as code: a folder that others can write to is not used. Files of other
versions, or that are damaged, are the compiler's business: it goes by their names, which contain
all that decides what it makes, and makes anew what it cannot read.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from revivemoe.host.own_folder import locked, own_folder
from revivemoe.host.variables import set_variables

WITHIN_S = 300.0
"""For who compiles at the moment; then it is compiled here, too, and elsewhere."""
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def compile_cache(folders: Sequence[Path]) -> Iterator[str]:
    """The first of the folders that can be used, for this process alone if it comes first: of those
    that start at once one compiles, and the others then find what it has made. Else a folder that
    goes when compiling is done. Gives what is to be said of that; empty where all is well. Raises
    OSError where there is no place at all.
    """
    with ExitStack() as stack:
        where, said = _usable(folders)
        if where is not None:
            try:
                alone = ExitStack()
                stack.push(alone)
                if alone.enter_context(locked(where / "lock", WITHIN_S)):
                    alone.close()  # what it has made is there
            except OSError as error:  # there are locks of the compiler's own in there
                where, said = None, f", kept nowhere: {error}"
        if where is None:
            temporary = tempfile.TemporaryDirectory(prefix="revivemoe-", ignore_cleanup_errors=True)
            where = Path(stack.enter_context(temporary))
        set_variables({VARIABLE: str(where)})
        yield said


def _usable(folders: Sequence[Path]) -> tuple[Path | None, str]:
    why = "none was named"
    for folder in folders:
        try:
            where = own_folder(folder)
            with tempfile.TemporaryFile(dir=where) as file:  # it may be full
                file.write(bytes(1 << 20))
                file.flush()
            return where, ""
        except OSError as error:
            why = " ".join(str(error).split())[:200]
    return None, f", kept nowhere: {why}"
