"""The experts' side of a rank: slots, what lies in them, where more of it comes from.

All that an expert rank has; an attention rank of a disaggregated deployment has it with no slots.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from revivemoe.ids import ExpertId, LayerId, RankId, SlotId
from revivemoe.membership.placement import EMPTY, ExpertPlacement
from revivemoe.messages.reports import SlotLoad
from revivemoe.model.dense import DenseLayer
from revivemoe.model.expert_loads import ExpertLoader, ExpertSource, LoadReport
from revivemoe.model.expert_reader import ExpertReader
from revivemoe.model.experts import ExpertExchange, MoeLayer
from revivemoe.model.host_cache import HostCache

PORTION_BYTES = 64 << 20


def _layer_of(load: SlotLoad) -> LayerId:
    return load.layer


class ExpertWorker:
    """Experts in slots, and the exchange that brings tokens to them."""

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        hidden_size: int,
        model_dir: Path,
        dtype: torch.dtype,
        dense: Sequence[DenseLayer] = (),
    ) -> None:
        """`layers`: of this rank, on its device; their modules hold its slots. `dense`: see
        `ExpertExchange`.
        """
        self.exchange = ExpertExchange(layers, hidden_size, dtype, dense)
        self._loader = ExpertLoader(layers, ExpertReader(model_dir, dtype))

    def held(self) -> dict[LayerId, tuple[int, ...]]:
        """The expert in each slot, by layer; -1: none."""
        return {layer.layer: tuple(layer.held) for layer in self.exchange.layers.values()}

    def resize(self, num_slots: int) -> None:
        """Give every layer so many slots, all of them empty. Not while a step runs."""
        for layer in self.exchange.layers.values():
            layer.resize(num_slots)

    def num_bytes(self) -> int:
        """What the slots take."""
        layers = self.exchange.layers.values()
        return sum(
            getattr(layer.module, name).nbytes
            for layer in layers
            for name in layer.module.revive_rows
        )

    def to_load(self, placement: ExpertPlacement, me: RankId) -> tuple[SlotLoad, ...]:
        """What `placement` gives this rank that its slots do not hold yet."""
        held = self.held()
        return tuple(
            SlotLoad(layer, SlotId(slot), ExpertId(expert))
            for layer, given in zip(placement.layers, placement.slots.get(me, ()), strict=False)
            for slot, expert in enumerate(given)
            if expert not in (EMPTY, held[layer][slot])
        )

    def in_portions(self, loads: Sequence[SlotLoad]) -> list[Sequence[SlotLoad]]:
        """`loads`, layer by layer, in portions of about `PORTION_BYTES`: what is read at once, and
        so what a rank does before it looks for a fence again.
        """
        each = sum(math.prod(s) * dtype.itemsize for s, dtype in self.row_shapes().values())
        most = max(1, PORTION_BYTES // each)
        portions: list[Sequence[SlotLoad]] = []
        for _, group in groupby(sorted(loads, key=_layer_of), key=_layer_of):
            of_layer = list(group)
            portions += [of_layer[i : i + most] for i in range(0, len(of_layer), most)]
        return portions

    def load(self, loads: Sequence[SlotLoad], sources: Sequence[ExpertSource] = ()) -> LoadReport:
        """Load experts into slots that the present epoch does not use; from any thread.

        `sources`, in this order, are asked before host memory and the checkpoint. Raises
        CheckpointError; experts already loaded by then stay.
        """
        return self._loader.load(loads, sources)

    def find(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
        """Copies of an expert's rows, if a slot here holds it: for a peer. From any thread."""
        return self._loader.find(layer, expert)

    def attach_host_cache(self, fd: int) -> None:
        """Share converted experts with the other ranks of this host (`create_host_cache`).

        Raises ValueError if the cache does not fit this model.
        """
        self._loader.host_cache = HostCache(fd, self.row_shapes())

    def row_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of one expert's share of each parameter of its module."""
        module = next(iter(self.exchange.layers.values())).module
        params = {name: getattr(module, name) for name in module.revive_rows}
        return {name: (tuple(param.shape[1:]), param.dtype) for name, param in params.items()}

    def fill_host_cache(self) -> int:
        """Put the experts this rank holds into host memory; returns how many. From any thread."""
        return self._loader.fill_host_cache()
