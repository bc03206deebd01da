"""The instance's side: its events and whoever waits for it to serve."""

import asyncio
from types import SimpleNamespace

import pytest

from revivemoe.epochs.state import Starting
from revivemoe.serving import event_log
from revivemoe.serving.event_log import EventLog
from revivemoe.serving.instance import Instance
from revivemoe.streams import FellBehind


def run(main) -> None:
    asyncio.run(asyncio.wait_for(main(), 5))


def test_every_reader_gets_what_was_and_what_comes():
    async def main() -> None:
        log = EventLog()
        for k in range(event_log.TOLD_AT_FIRST + 5):
            log.add({"k": k})
        readers = [log.follow() for _ in range(3)]
        for k in range(5, event_log.TOLD_AT_FIRST + 5):
            assert [await anext(reader) for reader in readers] == [{"k": k}] * 3
        waiting = [asyncio.ensure_future(anext(reader)) for reader in readers]
        await asyncio.sleep(0)
        log.add({"k": "new"})
        log.add({"k": "newer"})
        assert await asyncio.gather(*waiting) == [{"k": "new"}] * 3
        assert await anext(readers[0]) == {"k": "newer"}

    run(main)


def test_a_reader_that_stalls_costs_nothing_and_is_told(monkeypatch):
    monkeypatch.setattr(event_log, "KEPT", 10)

    async def main() -> None:
        log = EventLog()
        log.add({"k": 0})
        slow, slower = log.follow(), log.follow()
        assert await anext(slow) == await anext(slower) == {"k": 0}
        for k in range(1, 11):
            log.add({"k": k})
        assert await anext(slow) == {"k": 1}
        log.add({"k": 11})
        assert await anext(slow) == {"k": 2}
        with pytest.raises(FellBehind, match="1 events were not read"):
            await anext(slower)
        assert len(log._events) == 10

    run(main)


@pytest.mark.parametrize("turns", range(6))
def test_a_cancel_that_comes_with_a_change_of_the_state_is_not_lost(turns):
    """It is not by `wait_for` before Python 3.12."""

    async def main() -> None:
        engine = SimpleNamespace(state=Starting())
        instance = SimpleNamespace(engine=engine, _changed=asyncio.Event())
        task = asyncio.ensure_future(Instance._until_settled(instance, 55.0))
        await asyncio.sleep(0.01)
        instance._changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
        assert task.cancelled()

    run(main)
