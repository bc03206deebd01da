"""What an operator may ask of the engine: `POST /v1/fault_tolerance/apply`.

Instructions are asynchronous: taken here, carried out by the engine, and told of in the events and
the status under the request id. A request id that was taken before changes nothing (idempotent).
"""

from collections import OrderedDict
from collections.abc import Callable

from revivemoe.engine.engine import Engine
from revivemoe.epochs.state import FailedState, Paused, Serving, Starting, state_name
from revivemoe.ids import RankId
from revivemoe.messages.commands import Inject
from revivemoe.messages.events import Applied
from revivemoe.recovery.faults import DeviceReport, Fault
from revivemoe.recovery.plan import Continue, RecoveryPlan, describe_plan
from revivemoe.streams import Document

KEPT_IDS = 1000
RANKS_OF_SCALE_DOWN = ("exclude_dp_ranks", "ranks", "ids")
"""Names of its one parameter: two of vLLM's versions, and ours."""
Handler = Callable[[Document, str, float], Document | None]


class Operations:
    """Checks instructions and hands them to the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._taken: OrderedDict[str, None] = OrderedDict()
        self._handlers: dict[str, Handler] = {
            "isolate": self._isolate,
            "scale_down": self._scale_down,
            "report": self._report,
            "restore_experts": self._restore,
            "rejoin": self._rejoin,
            "retry": self._retry,
            "pause": self._pause,
            "resume": self._resume,
            "role_switch": self._role_switch,
            "whatif": self._what_if,
        }

    def apply(
        self, instruction: str, params: Document, request_id: str, now: float
    ) -> Document | None:
        """Returns a document for `whatif`, None otherwise. Raises ValueError for wrong input."""
        handler = self._handlers.get(instruction)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            raise ValueError(f"instruction {instruction!r} is unknown: choose one of {known}")
        if instruction == "whatif":
            return handler(params, request_id, now)
        if request_id in self._taken:
            return None
        handler(params, request_id, now)
        self._taken[request_id] = None
        while len(self._taken) > KEPT_IDS:
            self._taken.popitem(last=False)
        self._engine.last_ft_request_id = request_id
        self._engine.tell(Applied(instruction, params, request_id))
        return None

    # ---- instructions ------------------------------------------------------------------------

    def _isolate(self, params: Document, request_id: str, now: float) -> None:
        _only(params, "id")
        rank = self._rank(params, "id")
        view = self._engine.ranks[rank]
        if view.member:
            self._take_out([rank], request_id, now)
            return
        self._need_alive()
        if isinstance(self._engine.state, Starting):
            raise ValueError("the instance is starting: this can be done once it serves")
        if not self._engine.maintenance.call_off(rank, now):
            raise ValueError(f"rank {rank} is not a member of the present epoch: it is out already")

    def _scale_down(self, params: Document, request_id: str, now: float) -> None:
        """vLLM's: go on without these ranks; those that are gone already are not to come back."""
        _only(params, *RANKS_OF_SCALE_DOWN, "timeout")
        _check_timeout(params)
        key = next((name for name in RANKS_OF_SCALE_DOWN if name in params), "ids")
        self._need_serving()
        ranks = self._ranks(params, key)
        present = [rank for rank in ranks if self._engine.ranks[rank].member]
        if present:
            self._take_out(present, request_id, now)
        for rank in set(ranks) - set(present):
            self._engine.maintenance.call_off(rank, now)

    def _take_out(self, ranks: list[RankId], request_id: str, now: float) -> None:
        self._need_serving()
        faults = [Fault(rank, "isolate", "asked by an operator") for rank in ranks]
        plan = self._plan_without(ranks)
        if not isinstance(plan, Continue):
            raise ValueError(f"the instance cannot go on without {ranks}: {plan.reason}")
        for rank in ranks:
            self._engine.ranks[rank].taken_out = True
        self._engine.maintenance.drain_all(faults, now, request_id)

    def _report(self, params: Document, request_id: str, now: float) -> None:
        """An outside monitor tells of a device fault."""
        _only(params, "id", "level", "code", "detail")
        rank, level = self._rank(params, "id"), _int(params, "level")
        if not 0 <= level <= 6:
            raise ValueError(f"'level' {level} is out of range: 1 to 6, or 0 for healthy again")
        code, detail = params.get("code", ""), params.get("detail", "")
        if not isinstance(code, str) or not isinstance(detail, str):
            raise ValueError("'code' and 'detail' must be strings")
        if level and self._engine.ranks[rank].dead:
            raise ValueError(f"rank {rank} is out already")
        self._engine.on_health(DeviceReport(rank, level, code, detail, "report"), now)

    def _restore(self, params: Document, request_id: str, now: float) -> None:
        _only(params)
        self._need_serving()
        self._engine.maintenance.restore(request_id, now)

    def _rejoin(self, params: Document, request_id: str, now: float) -> None:
        _only(params, "id")
        self._need_serving()
        self._engine.maintenance.rejoin(self._rank(params, "id"), now, request_id)

    def _retry(self, params: Document, request_id: str, now: float) -> None:
        """vLLM's: the same ranks, a new domain, the interrupted step again."""
        _only(params, "timeout")
        _check_timeout(params)
        self._need_serving()
        self._engine.epochs.redo("retry", now, asked=True)

    def _pause(self, params: Document, request_id: str, now: float) -> None:
        if isinstance(self._engine.state, Paused):
            raise ValueError("the instance is paused already")
        self._need_alive()
        self._engine.maintenance.pause(request_id, now)

    def _resume(self, params: Document, request_id: str, now: float) -> None:
        self._need_alive()
        self._engine.maintenance.resume(now)

    def _role_switch(self, params: Document, request_id: str, now: float) -> None:
        """An attention rank becomes an expert rank, in the background."""
        _only(params, "id")
        self._need_serving()
        rank = self._member(params, "id")
        self._engine.maintenance.switch_role(rank, now, request_id)

    def _what_if(self, params: Document, request_id: str, now: float) -> Document:
        """The plan for the loss of these ranks now; does nothing."""
        _only(params, "ids")
        return describe_plan(self._plan_without(self._members(params, "ids")))

    def _plan_without(self, ranks: list[RankId]) -> RecoveryPlan:
        faults = [Fault(rank, "whatif", "asked by an operator") for rank in ranks]
        return self._engine.epochs.plan_for(faults)

    def inject(self, fault: Inject, rank: RankId) -> None:
        """Hand a fault to a living rank. Raises ValueError if there is none of that id."""
        view, last_step = self._engine.ranks.get(rank), self._engine.signals.last_step
        if view is None or view.dead:
            raise ValueError(f"id {rank} is not a living rank")
        if fault.step is not None and fault.step <= last_step:
            raise ValueError(f"step {fault.step} is past: the instance is at {last_step}")
        self._engine.epochs.fleet.send(rank, fault)

    # ---- checks ------------------------------------------------------------------------------

    def _need_serving(self) -> None:
        state = self._engine.state
        if not isinstance(state, Serving):
            raise ValueError(f"the instance is {state_name(state)}: this can be done while serving")

    def _need_alive(self) -> None:
        if isinstance(self._engine.state, FailedState):
            raise ValueError("the instance has failed")

    def _rank(self, params: Document, key: str) -> RankId:
        rank = RankId(_int(params, key))
        if rank not in self._engine.ranks:
            raise ValueError(f"{key!r} {rank} is not a rank of this instance")
        return rank

    def _member(self, params: Document, key: str) -> RankId:
        rank = self._rank(params, key)
        if rank not in self._engine.membership.members:
            raise ValueError(f"rank {rank} is not a member of the present epoch")
        return rank

    def _ranks(self, params: Document, key: str) -> list[RankId]:
        ids = params.get(key)
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"{key!r} must be a list of rank ids")
        return list(dict.fromkeys(self._rank({key: one}, key) for one in ids))

    def _members(self, params: Document, key: str) -> list[RankId]:
        return [self._member({key: rank}, key) for rank in self._ranks(params, key)]


def _only(params: Document, *known: str) -> None:
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(
            f"unknown parameter {unknown[0]!r}: this instruction takes {', '.join(known) or 'none'}"
        )


def _check_timeout(params: Document) -> None:
    """vLLM's, in seconds. It has no effect here: the policy's deadlines hold."""
    value = params.get("timeout", 1)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError("'timeout' must be a positive number of seconds")


def _int(document: Document, key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key!r} must be an integer")
    return value
