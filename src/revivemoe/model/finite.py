"""Where in a step the first NaN or infinity appeared on this rank, without waiting for the device.

The places of a step in order: for each MoE layer attention, router, rows, weights, experts,
combine; then the logits. What is noted at a place is the smallest and the largest value there: one
kernel, which lets NaN through (as `torch.aminmax` promises), and cannot overflow, as a sum could.
"""

from collections.abc import Sequence

import torch

from revivemoe.core.effects import Broken, Place
from revivemoe.ids import LayerId

STAGES = ("attention", "router", "rows", "weights", "experts", "combine")
"""attention: own hidden states at dispatch; router: own weights; rows and weights: what arrived for
this rank's experts; experts: what they made of it; combine: what came back for own tokens."""
LOGITS = LayerId(-1)
"""Stands for the layer of what comes after the last one."""


class NonFiniteStep(Broken):
    """The step has met NaN or infinity on this rank and must be undone; nothing was drawn."""

    def __init__(self, place: Place) -> None:
        origin = "produced here" if place.produced_here else "from elsewhere"
        super().__init__(f"non-finite numbers in {place.phase} of layer {place.layer}, {origin}")
        self.layer, self.phase, self.produced_here = place


class FiniteCheck:
    """Notes of one step. One kernel for each note, one synchronisation in `first`."""

    def __init__(
        self, layers: Sequence[LayerId], dtypes: Sequence[torch.dtype], device: torch.device
    ) -> None:
        """`layers`: the MoE layers, ascending. `dtypes`: all that will be noted."""
        self._layers = tuple(layers)
        places = [(layer, stage) for layer in layers for stage in STAGES] + [(LOGITS, "logits")]
        self._place_of = {place: i for i, place in enumerate(places)}
        self._ranges = {
            dtype: torch.zeros(len(places), 2, dtype=dtype, device=device) for dtype in set(dtypes)
        }
        """By dtype: smallest and largest value at each place. Zeros where nothing was noted."""
        self._ends = {
            dtype: [place.unbind() for place in ranges.unbind()]
            for dtype, ranges in self._ranges.items()
        }

    def reset(self) -> None:
        """A new step begins."""
        for ranges in self._ranges.values():
            ranges.zero_()

    def note(self, layer: LayerId, stage: str, values: torch.Tensor) -> None:
        """Remember whether `values`, of any shape, are all finite. An empty tensor is."""
        if values.numel():
            place = self._place_of[layer, stage]
            torch.aminmax(values, out=self._ends[values.dtype][place])

    def note_logits(self, logits: torch.Tensor) -> None:
        """Those of a step may come in slices."""
        if logits.numel():
            low, high = self._ends[logits.dtype][self._place_of[LOGITS, "logits"]]
            found = torch.aminmax(logits)
            torch.minimum(low, found.min, out=low)
            torch.maximum(high, found.max, out=high)

    def first(self) -> Place | None:
        """The earliest place that was produced here; else the earliest at all; None: all finite.

        Waits for the device.
        """
        broken = self._broken()
        if not broken:
            return None
        places = self._events(broken)
        produced = [place for place in places if place.produced_here]
        return next(iter(produced + places), None)

    def _broken(self) -> set[tuple[LayerId, str]]:
        wide = torch.stack([ranges.float() for ranges in self._ranges.values()])
        finite: list[bool] = wide.isfinite().all(-1).all(0).tolist()
        return {place for place, i in self._place_of.items() if not finite[i]}

    def _events(self, broken: set[tuple[LayerId, str]]) -> list[Place]:
        """All broken outputs, in the order of the step."""
        events = []
        others_fine = True  # nothing broken has come back from the experts so far
        for layer in self._layers:
            if {(layer, "attention"), (layer, "router")} & broken:
                events.append(Place(layer, "attention", others_fine))
            if (layer, "experts") in broken:
                arrived_fine = not {(layer, "rows"), (layer, "weights")} & broken
                events.append(Place(layer, "experts", arrived_fine))
            if (layer, "combine") in broken:
                others_fine = False
                events.append(Place(layer, "combine", False))
        if (LOGITS, "logits") in broken:
            events.append(Place(LOGITS, "sample", others_fine))
        return events
