"""The fake transport: exchanges among the members of one epoch, as barriers that carry values."""

from collections.abc import Callable

from revivemoe.ids import Epoch, RankId

Wake = Callable[[list[object]], None]
Fail = Callable[[str], None]


class Exchange:
    """The k-th exchange of a domain: complete once every member has published."""

    def __init__(self) -> None:
        self.values: dict[RankId, object] = {}
        self.waiting: dict[RankId, tuple[Wake, Fail]] = {}


class Domain:
    def __init__(self, epoch: Epoch, members: tuple[RankId, ...], eager_errors: bool) -> None:
        """`eager_errors`: whoever waits for a member that is gone gets an error (gloo, NCCL);
        otherwise it waits for the fence (shared memory)."""
        self.epoch, self.members = epoch, members
        self._eager_errors = eager_errors
        self._exchanges: dict[int, Exchange] = {}
        self._gone: set[RankId] = set()

    def publish(self, k: int, rank: RankId, value: object, wake: Wake, fail: Fail) -> None:
        """Take part in the k-th exchange. `wake` or `fail` is called once it is decided."""
        assert rank in self.members, f"rank {rank} is no member of epoch {self.epoch}"
        exchange = self._exchanges.setdefault(k, Exchange())
        assert rank not in exchange.values, f"rank {rank} publishes exchange {k} twice"
        exchange.values[rank] = value
        exchange.waiting[rank] = (wake, fail)
        if len(exchange.values) == len(self.members):
            self._complete(self._exchanges.pop(k))
        elif self._eager_errors and (absent := self._gone - exchange.values.keys()):
            fail(f"lost connection to rank {min(absent)}")

    def leave(self, rank: RankId) -> None:
        """A member has died or left. What it has published stays readable."""
        self._gone.add(rank)
        for exchange in self._exchanges.values():
            exchange.waiting.pop(rank, None)
            if self._eager_errors and rank not in exchange.values:
                for _, fail in list(exchange.waiting.values()):
                    fail(f"lost connection to rank {rank}")

    def _complete(self, exchange: Exchange) -> None:
        values = [exchange.values[rank] for rank in self.members]
        for wake, _ in list(exchange.waiting.values()):
            wake(values)
