"""The experts' side of a rank: slots, what lies in them, where more of it comes from.

All that an expert rank has; an attention rank of a disaggregated deployment has it with no slots.
Experts come from a peer, from host memory or from the checkpoint, whoever has them.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import torch

from revivemoe.core.slots import ExpertSlots
from revivemoe.ids import ExpertId, LayerId, SlotId
from revivemoe.membership.placement import EMPTY
from revivemoe.messages.commands import SlotLoad
from revivemoe.model.dense import DenseLayer
from revivemoe.model.expert_reader import ExpertReader, Write
from revivemoe.model.expert_recipe import copy_rows
from revivemoe.model.experts import ExpertExchange, MoeLayer
from revivemoe.model.host_cache import HostCache
from revivemoe.model.tensor_files import TensorFiles

PORTION_BYTES = 64 << 20
WRITTEN_WITHIN_S = 20.0
"""One expert, by an earlier load of which nobody wants anything any more; then this one fails."""
Rows = dict[str, torch.Tensor]
"""One expert's share of each parameter."""


class ExpertSource(Protocol):
    """Where an expert's rows may be had."""

    @property
    def name(self) -> str: ...

    def fetch(self, layer: LayerId, expert: ExpertId) -> Rows | None:
        """On any device; None if it is not to be had here."""


@dataclass(frozen=True)
class LoadReport:
    num_bytes: int
    sources: Counter[str]
    """Experts by the name of the source they came from; `disk` is the checkpoint."""


class ExpertWorker:
    """Experts in slots, and the exchange that brings tokens to them."""

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        slots: ExpertSlots,
        hidden_size: int,
        model_dir: Path,
        dtype: torch.dtype,
        dense: Sequence[DenseLayer] = (),
    ) -> None:
        """`layers`: of this rank, on its device; their modules hold its `slots`. `dense`: see
        `ExpertExchange`.
        """
        self.slots = slots
        self.exchange = ExpertExchange(layers, hidden_size, dtype, dense)
        self._layers = self.exchange.layers
        self._reader = ExpertReader(model_dir, dtype)
        self._slots_lock = threading.Condition()
        """Held while a slot is given to a load or read; notified when one has been written."""
        self._written: set[tuple[LayerId, SlotId]] = set()
        """Slots being written: without the lock, as a disk may take its time. They hold nothing
        that anybody reads, and have one writer: nobody ever sees half of each."""
        self._host_cache: HostCache | None = None

    def resize(self, num_slots: int) -> None:
        """Give every layer so many slots, all of them empty; none at all if there is no memory for
        some of them. Not while a step runs.
        """
        with self._slots_lock:
            self.slots.resize(0)
            try:
                for layer in self._layers.values():
                    layer.resize(num_slots)
            except BaseException:
                for layer in self._layers.values():
                    layer.resize(0)
                raise
            self.slots.resize(num_slots)

    def num_bytes(self) -> int:
        """What the slots take."""
        modules = [layer.module for layer in self._layers.values()]
        return sum(getattr(m, name).nbytes for m in modules for name in m.revive_rows)

    def row_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of one expert's share of each parameter of its module."""
        module = next(iter(self._layers.values())).module
        params = {name: getattr(module, name) for name in module.revive_rows}
        return {name: (tuple(param.shape[1:]), param.dtype) for name, param in params.items()}

    def in_portions(self, loads: Sequence[SlotLoad]) -> list[Sequence[SlotLoad]]:
        """`loads`, layer by layer, in portions of about `PORTION_BYTES`: what is read at once, and
        so what a rank does before it looks for a fence again.
        """
        each = sum(math.prod(s) * dtype.itemsize for s, dtype in self.row_shapes().values())
        most = max(1, PORTION_BYTES // each)
        return [
            of_layer[i : i + most]
            for of_layer in _by_layer(loads)
            for i in range(0, len(of_layer), most)
        ]

    def begin(self, loads: Sequence[SlotLoad]) -> int:
        """`ExpertSlots.begin`."""
        with self._slots_lock:
            return self.slots.begin(loads)

    def load(
        self,
        loads: Sequence[SlotLoad],
        peers: Sequence[ExpertSource] = (),
        begun: int | None = None,
    ) -> LoadReport:
        """Fill slots that the present epoch does not use; from any thread, beside a running model.

        `peers` in their order, then host memory, then the checkpoint, which is asked for all that
        are left of a layer at once. `begun`: what `begin` returned, if these are part of a load
        that has begun before. Raises CheckpointError, SlotTaken; what came before it is in its
        slot.
        """
        begun = self.begin(loads) if begun is None else begun
        sources: Counter[str] = Counter()
        num_bytes = 0
        with ExitStack() as stack:
            files = TensorFiles(stack)
            for of_layer in _by_layer(loads):
                for load, name, write in self._fetched(of_layer, peers, files):
                    num_bytes += self._take(begun, load, write)
                    sources[name] += 1
        return LoadReport(num_bytes, sources)

    def _take(self, begun: int, load: SlotLoad, write: Write) -> int:
        """Write an expert into its slot, however long that takes; returns its bytes."""
        rows = self._begin_writing(begun, load)
        written = False
        try:
            write(rows)
            written = True
        finally:
            with self._slots_lock:
                self._written.discard((load.layer, load.slot))
                self._slots_lock.notify_all()
                if written:
                    self.slots.check(begun, load)
                    self.slots.fill(load)
                    if self._host_cache is not None:
                        self._host_cache.put(load.layer, load.expert, rows)
        return sum(tensor.nbytes for tensor in rows.values())

    def _begin_writing(self, begun: int, load: SlotLoad) -> Rows:
        """The slot's rows, once nobody else writes them: an earlier load may be at it still.
        Raises SlotTaken, TimeoutError.
        """
        place = load.layer, load.slot
        with self._slots_lock:
            if not self._slots_lock.wait_for(lambda: place not in self._written, WRITTEN_WITHIN_S):
                raise TimeoutError(
                    f"slot {load.slot} of layer {load.layer} is still written by an earlier load"
                )
            self.slots.check(begun, load)
            self._written.add(place)
            return self._layers[load.layer].read_slot(load.slot)

    def _fetched(
        self, loads: Sequence[SlotLoad], peers: Sequence[ExpertSource], files: TensorFiles
    ) -> Iterator[tuple[SlotLoad, str, Write]]:
        """(load, name of its source, what writes its rows) of one layer. To be written before the
        next is asked for.
        """
        sources = [*peers, self._host_cache] if self._host_cache is not None else peers
        left = []
        for load in loads:
            found = ((s.name, s.fetch(load.layer, load.expert)) for s in sources)
            name, rows = next(((n, rows) for n, rows in found if rows is not None), ("", None))
            if rows is None:
                left.append(load)
            else:
                yield load, name, partial(copy_rows, rows)
        if left:
            for_expert: dict[ExpertId, list[SlotLoad]] = {}
            for load in left:
                for_expert.setdefault(load.expert, []).append(load)
            for expert, write in self._reader.each(left[0].layer, sorted(for_expert), files):
                for load in for_expert[expert]:
                    yield load, "disk", write

    def find(self, layer_id: LayerId, expert: ExpertId) -> Rows | None:
        """Copies, on the host, of an expert's rows in one of the slots; from any thread."""
        with self._slots_lock:
            held = self.slots.row(layer_id)
            if expert not in held:
                return None
            rows = self._layers[layer_id].read_slot(SlotId(held.index(expert)))
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in rows.items()}

    def attach_host_cache(self, fd: int) -> None:
        """Share converted experts with the other ranks of this host (`create_host_cache`).

        Raises ValueError if the cache does not fit this model.
        """
        self._host_cache = HostCache(fd, self.row_shapes())

    def fill_host_cache(self) -> int:
        """Put the experts this rank holds into host memory; returns how many. From any thread."""
        assert self._host_cache is not None, "no host cache is attached"
        count = 0
        for layer in self._layers:
            for slot in range(self.slots.num_slots):
                with self._slots_lock:
                    count += self._cache_slot(layer, SlotId(slot))
        return count

    def _cache_slot(self, layer: LayerId, slot: SlotId) -> bool:
        assert self._host_cache is not None
        held = self.slots.row(layer)
        if slot >= len(held) or held[slot] == EMPTY:
            return False
        self._host_cache.put(layer, ExpertId(held[slot]), self._layers[layer].read_slot(slot))
        return True


def _by_layer(loads: Sequence[SlotLoad]) -> list[list[SlotLoad]]:
    layer_of = attrgetter("layer")
    return [list(group) for _, group in groupby(sorted(loads, key=layer_of), key=layer_of)]
