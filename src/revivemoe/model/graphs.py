"""Graph mode: a decoder layer is compiled once, and the graph serves all layers and every epoch.

What a recovery changes is in no graph. Attention over pages and the experts of the domain lie
behind operators that the compiler does not look into; a mask is a tensor; the number of a layer is
an input. So nothing is compiled anew when ranks go or come, experts move, or roles change.

Operators find the pages and the exchange in `Graphs`, of which a process has one at a time.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from revivemoe.ids import LayerId
from revivemoe.kernels.native import Native
from revivemoe.model.experts import ExpertExchange
from revivemoe.model.native_modules import rows_ours
from revivemoe.model.paged import PagedCache, attend

_LIBRARY = torch.library.Library("revivemoe", "FRAGMENT")
_DEFINED = False
MOST_GRAPHS = 64
"""Of one function. Layers of a family differ in kind (dense, experts, windows), not by number."""
WARM_UP_ROWS = (1, 2, 3)
"""A single row makes a graph of its own; two and three show that the next ones share one."""


class CannotCompile(Exception):
    """The layers cannot be compiled; the message is one line."""


class Graphs:
    """Compiled layers of one model."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        attention: Sequence[nn.Module],
        cache: PagedCache,
        exchange: ExpertExchange,
        native: Native | None = None,
    ) -> None:
        """`layers`: decoder layers; `attention`: the modules that attend, by layer."""
        define_operators()
        self.linears = None if native is None else NativeLinears(native)
        if self.linears is not None:
            self.linears.use(layers)
        cache.clock = torch.zeros(1, dtype=torch.int64, device=cache.pages[0][0].device)
        self._layers, self._cache, self._exchange = layers, cache, exchange
        self._attention = {module.layer_idx: module for module in attention}
        for moe in exchange.layers.values():
            moe.module.revive_in_graph, moe.module.revive_number = True, int(moe.layer)
        self.dry = True
        """Nothing is written, sent or computed behind the operators: the compiler looks."""
        self.compiled = 0
        self.compile_s = 0.0
        self._known = 0

    @property
    def recompiled(self) -> int:
        """Since the warm-up: layers that ran without a graph, as none fitted; and graphs made."""
        return graphs_made() - self._known + self._cache.eager_calls

    def compile(self, warm_up: Callable[[int], None]) -> None:
        """`warm_up`: runs the model with so many rows. Raises CannotCompile; then nothing is.

        From then on this process compiles no more: nobody waits for that in the middle of a
        recovery. What no graph fits runs without one, and is counted.
        """
        began, before = time.monotonic(), graphs_made()
        torch.compiler.set_stance("default")
        try:
            for layer in self._layers:
                layer.compile(dynamic=True, fullgraph=True)
            with _settings(), self:
                for rows in WARM_UP_ROWS:
                    warm_up(rows)
        except Exception as error:  # others' code, and a compiler that may not be there
            self._undo()
            raise CannotCompile(_one_line(error)) from None
        finally:
            torch.compiler.set_stance("eager_on_recompile")
        self.compile_s, self._known = time.monotonic() - began, graphs_made()
        self.compiled = self._known - before
        self.dry, self._cache.eager_calls = False, 0

    def _undo(self) -> None:
        self._cache.clock = None
        for layer in self._layers:
            layer._compiled_call_impl = None
            for module in layer.modules():
                if type(module) is NativeLinear:
                    module.__class__ = nn.Linear
        for moe in self._exchange.layers.values():
            moe.module.revive_in_graph = False

    def __enter__(self) -> None:
        """From now on operators work on these pages and this exchange. May be entered by several
        micro-batches, in any order.
        """
        global _current
        _current = self

    def __exit__(self, *raised: object) -> None:
        pass

    # ---- behind the operators ----------------------------------------------------------------

    def keep(self, key: Tensor, value: Tensor, layer: int) -> None:
        if not self.dry:
            self._cache.write(key, value, layer)

    def attend(
        self,
        query: Tensor,
        layer: int,
        dim_v: int,
        scale: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if self.dry:
            return query.new_zeros(1, query.shape[2], query.shape[1], dim_v)
        return attend(self._attention[layer], query, dim_v, scale, window, sinks)[None]

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self.linears is not None, "no kernels of our own"
        return self.linears(rows, weight, bias)

    def experts(self, hidden: Tensor, ids: Tensor, weights: Tensor, layer: int) -> Tensor:
        if self.dry:
            return torch.zeros_like(hidden)
        moe = self._exchange.layers[LayerId(layer)]
        return self._exchange.run(moe, hidden, ids, weights).clone()


_current: Graphs | None = None


def _now() -> Graphs:
    assert _current is not None, "a graph is run outside a step"
    return _current


def graphs_made() -> int:
    """By the compiler, in this process, so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def _settings() -> Iterator[None]:
    """Of the compiler, that differ from its own."""
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=MOST_GRAPHS),
        _own_headers() as own,
        torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=own),
    ):
        yield


@contextmanager
def _own_headers() -> Iterator[bool]:
    """Headers that are compiled once, twice as fast as without: the compiler keeps them outside of
    the folder that it is given, where others may have put theirs. Here they are in it; gives False
    where that cannot be, or the program that it names them with is not there.
    """
    from torch._inductor import codecache

    places = {"_HEADER_DIR": "headers", "_HEADER_LOCK_DIR": "headers/locks"}
    before = {name: str(getattr(codecache, name, "")) for name in places}
    if "" in before.values() or shutil.which("openssl") is None:
        yield False
        return
    try:
        for name, folder in places.items():
            place = os.path.join(codecache.cache_dir(), folder)
            os.makedirs(place, exist_ok=True)
            setattr(codecache, name, place)
        yield True
    finally:
        for name, was in before.items():
            setattr(codecache, name, was)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


# ---- linear layers ------------------------------------------------------------------------------


class NativeLinear(nn.Linear):
    """In a graph: ours up to so many rows, which are known only when it runs."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = torch.ops.revivemoe.linear(input, self.weight, self.bias)
        return out


class NativeLinears:
    """By shape of a weight."""

    def __init__(self, native: Native) -> None:
        self._native, self._most = native, dict[tuple[int, ...], int]()

    def use(self, layers: Sequence[nn.Module]) -> None:
        """In the place of all linear layers that could be ours: which are is found by timing, and
        a graph that hung on that would not be found again by the next process.
        """
        for layer in layers:
            for module in layer.modules():
                if type(module) is nn.Linear and self._native.fits(module.weight):
                    module.__class__ = NativeLinear
                    self._time(module.weight)

    def _time(self, weight: Tensor) -> None:
        shape = tuple(weight.shape)
        if shape not in self._most:
            self._most[shape] = rows_ours(weight, self._native)

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        most = self._most[tuple(weight.shape)]
        if rows.dtype == weight.dtype and rows.numel() <= most * rows.shape[-1]:
            return self._native.linear(rows, weight, bias)
        return linear(rows, weight, bias)


# ---- operators ----------------------------------------------------------------------------------


def define_operators() -> None:
    """Idempotent."""
    global _DEFINED
    if _DEFINED:
        return
    _DEFINED = True
    kinds: Mapping[str, tuple[str, Callable[..., object], Callable[..., object]]] = {
        "keep": (
            "(Tensor key, Tensor value, Tensor(a!) clock, SymInt layer) -> ()",
            lambda key, value, clock, layer: _now().keep(key, value, layer),
            lambda *given: None,
        ),
        "attend": (
            "(Tensor query, Tensor clock, SymInt layer, SymInt dim_v, float? scale, "
            "SymInt? window, Tensor? sinks) -> Tensor",
            lambda query, clock, *how: _now().attend(query, *how),
            lambda query, clock, layer, dim_v, *how: query.new_empty(
                1, query.shape[2], query.shape[1], dim_v
            ),
        ),
        "linear": (
            "(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
            lambda *given: _now().linear(*given),
            lambda rows, weight, bias: rows.new_empty(*rows.shape[:-1], weight.shape[0]),
        ),
        "experts": (
            "(Tensor hidden, Tensor ids, Tensor weights, SymInt layer) -> Tensor",
            lambda *given: _now().experts(*given),
            lambda hidden, *given: torch.empty_like(hidden),
        ),
    }
    for name, (signature, act, shape) in kinds.items():
        _LIBRARY.define(name + signature)
        _LIBRARY.impl(name, act, "CompositeExplicitAutograd")
        torch.library.register_fake(f"revivemoe::{name}", shape, lib=_LIBRARY)
