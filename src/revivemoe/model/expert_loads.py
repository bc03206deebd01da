"""Load experts into slots: from a peer, from host memory, from the checkpoint, whoever has them."""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch

from revivemoe.ids import ExpertId, LayerId, SlotId
from revivemoe.membership.placement import EMPTY
from revivemoe.messages.commands import SlotLoad
from revivemoe.model.expert_reader import ExpertReader
from revivemoe.model.experts import MoeLayer
from revivemoe.model.host_cache import HostCache


class ExpertSource(Protocol):
    """Where an expert's rows may be had."""

    @property
    def name(self) -> str: ...

    def fetch(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
        """One expert's share of each parameter, any device; None if it is not to be had here."""
        ...


@dataclass(frozen=True)
class LoadReport:
    num_bytes: int
    seconds: float
    sources: dict[str, int]
    """Experts by the name of the source they came from; `disk` is the checkpoint."""


class ExpertLoader:
    """Fills slots that the present epoch does not use, from any thread, beside a running model."""

    def __init__(self, layers: Sequence[MoeLayer], reader: ExpertReader) -> None:
        self._layers = {layer.layer: layer for layer in layers}
        self._reader = reader
        self._slots_lock = threading.Lock()
        """Held while one slot is written or read, so that the cache never keeps half of each."""
        self.host_cache: HostCache | None = None

    def load(self, loads: Sequence[SlotLoad], peers: Sequence[ExpertSource]) -> LoadReport:
        """Peers in their order, then host memory, then the checkpoint, which is asked for all that
        are left of a layer at once. Raises CheckpointError; what came before it is in its slot.
        """
        began = time.monotonic()
        sources: dict[str, int] = {}
        num_bytes = 0
        for layer_id, group in groupby(sorted(loads, key=_by_layer), key=_by_layer):
            for load, name, rows in self._fetched(layer_id, list(group), peers):
                num_bytes += self._write(load, rows)
                sources[name] = sources.get(name, 0) + 1
        return LoadReport(num_bytes, time.monotonic() - began, sources)

    def find(self, layer_id: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
        """Copies, on the host, of an expert's rows in one of this rank's slots; from any thread."""
        layer = self._layers[layer_id]
        with self._slots_lock:
            if expert not in layer.held:
                return None
            rows = layer.read_slot(SlotId(layer.held.index(expert)))
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in rows.items()}

    def fill_host_cache(self) -> int:
        """Put what this rank's slots hold into host memory; returns how many experts."""
        assert self.host_cache is not None, "no host cache is attached"
        count = 0
        for layer in self._layers.values():
            for slot in range(len(layer.held)):
                with self._slots_lock:
                    expert = layer.held[slot]
                    if expert != EMPTY:
                        rows = layer.read_slot(SlotId(slot))
                        self.host_cache.put(layer.layer, ExpertId(expert), rows)
                        count += 1
        return count

    def _fetched(
        self, layer: LayerId, loads: Sequence[SlotLoad], peers: Sequence[ExpertSource]
    ) -> Iterable[tuple[SlotLoad, str, dict[str, torch.Tensor]]]:
        """(load, name of its source, rows) of one layer."""
        host = [self.host_cache] if self.host_cache is not None else []
        left = []
        for load in loads:
            found = _first([*peers, *host], layer, load.expert)
            if found is None:
                left.append(load)
            else:
                yield load, *found
        if not left:
            return
        experts = sorted({load.expert for load in left})
        rows = self._reader.read(layer, experts)
        for load in left:
            at = experts.index(load.expert)
            yield load, "disk", {name: tensor[at] for name, tensor in rows.items()}

    def _write(self, load: SlotLoad, rows: dict[str, torch.Tensor]) -> int:
        with self._slots_lock:
            self._layers[load.layer].write_slot(load.slot, load.expert, rows)
        if self.host_cache is not None:
            self.host_cache.put(load.layer, load.expert, rows)
        return sum(tensor.nbytes for tensor in rows.values())


def _by_layer(load: SlotLoad) -> LayerId:
    return load.layer


def _first(
    sources: Sequence[ExpertSource], layer: LayerId, expert: ExpertId
) -> tuple[str, dict[str, torch.Tensor]] | None:
    for source in sources:
        rows = source.fetch(layer, expert)
        if rows is not None:
            return source.name, rows
    return None
