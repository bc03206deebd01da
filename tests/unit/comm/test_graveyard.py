"""What is left behind is freed by a thread, whatever that meets."""

import errno
import time
import weakref

from revivemoe.comm import group
from revivemoe.comm.group import Graveyard


class Remains:
    """Something that can be seen to go."""


def freed(remains: "weakref.ref[Remains]", graveyard: Graveyard) -> bool:
    until = time.monotonic() + 2.0
    while time.monotonic() < until and (remains() is not None or len(graveyard)):
        time.sleep(0.01)
    return remains() is None and not len(graveyard)


def test_it_is_freed_as_soon_as_it_is_done() -> None:
    graveyard, held, ended = Graveyard(), [Remains()], [False]
    remains = weakref.ref(held[0])
    graveyard.bury(held, lambda: ended[0], 30.0)  # type: ignore[arg-type]
    time.sleep(0.1)
    assert remains() is not None
    assert len(graveyard) == 1
    ended[0] = True
    assert freed(remains, graveyard)


def test_it_is_freed_in_the_end_though_nobody_can_look(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(group, "_GRACE_S", 0.1)

    def blind() -> bool:
        raise OSError(errno.EMFILE, "no descriptor is free")

    graveyard, held = Graveyard(), [Remains()]
    remains = weakref.ref(held[0])
    graveyard.bury(held, blind, 0.1)  # type: ignore[arg-type]
    assert freed(remains, graveyard)
