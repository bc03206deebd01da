"""What a soak asks of a running server: its status, faults, and an operator's instructions."""

import contextlib
from collections.abc import Mapping

import httpx

from revivemoe.bench.documents import EngineStatus, Status

PREFIX = "/v1/fault_tolerance"


class Refused(Exception):
    """The server does not do what it was asked, and says why."""


class Instance:
    """Over one client that stays open: a new one for each question would cost more than it."""

    def __init__(self, client: httpx.AsyncClient, engine_pid: int) -> None:
        self._client, self.engine_pid = client, engine_pid

    async def status(self) -> Status:
        document: Status = (await self._client.get(f"{PREFIX}/status", timeout=30)).json()
        return document

    async def pids(self) -> dict[int, int]:
        return rank_pids(await self.status())

    async def inject(self, rank: int, kind: str, phase: str | None, params: object) -> None:
        """Raises Refused."""
        at = {} if phase is None else {"phase": phase}
        await self._post("inject", {"id": rank, "kind": kind, "at": at, "params": params})

    async def apply(self, instruction: str, **params: object) -> None:
        """Raises Refused."""
        await self._post("apply", {"instruction": instruction, "params": params})

    async def ask_back(self, rank: int) -> None:
        """As an operator who asks again if it was no time for it."""
        with contextlib.suppress(Refused):
            await self.apply("rejoin", id=rank)

    async def _post(self, what: str, body: dict[str, object]) -> None:
        response = await self._client.post(f"{PREFIX}/{what}", json=body, timeout=30)
        if response.status_code != 202:
            raise Refused(f"{what} {body}: {response.status_code} {response.text}")


def rank_pids(status: Status) -> dict[int, int]:
    """Process of each rank that is not dead, and has one already."""
    living = [e for e in status["engines"] if e["status"] != "dead"]
    return {e["id"]: e["pid"] for e in living if e["pid"] is not None}


Shape = Mapping[str, object]
"""What must be the same whenever all is well, by its name."""


def shape(status: Status) -> Shape:
    places = {
        f"rank {e['id']}": f"{'+'.join(e['roles'])} {e['logical_rank']}" for e in status["engines"]
    }
    return {**places, **status["experts"], "quality": status["quality"]}


def lacks(status: Status, well: Shape) -> str:
    """What keeps an instance from being as it was when all was well; "" if nothing does."""
    if status["state"] != "serving":
        return f"the instance is {status['state']}"
    if unwell := [f"rank {e['id']} is {_how(e)}" for e in status["engines"] if _how(e)]:
        return ", ".join(unwell)
    now = shape(status)
    return "; ".join(f"{k} is {now[k]}, was {was}" for k, was in well.items() if now[k] != was)


def misplaced(status: Status, well: Shape) -> list[int]:
    """Ranks that are in, but not in their places."""
    now = shape(status)
    return [e["id"] for e in status["engines"] if now[k := f"rank {e['id']}"] != well[k]]


def _how(engine: EngineStatus) -> str:
    if engine["status"] == "healthy":
        return "" if engine["logical_rank"] is not None else "healthy but no member"
    return engine["status"]
