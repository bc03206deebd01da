"""Read single experts of a checkpoint beside a live model, converted as `load_model` does it.

`transformers`' converter wants a model to put its results into. The reader keeps one of its own
whose parameters are all on the meta device; for a read, one experts module of it is given as many
experts as are read. Nothing is shared with the model that runs.
"""

import re
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from revivemoe.ids import ExpertId, LayerId
from revivemoe.model.load import (
    EXPERT_KEY,
    CheckpointError,
    add_expert,
    checkpoint_files,
    construct,
    convert,
    find_experts,
    set_num_experts,
)


class ExpertReader:
    """Reads converted rows of experts. Threads may share one: reads take turns."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        """Builds the skeleton. Not while another thread builds or runs a model: construction
        patches `nn.Module` for as long as it lasts. Raises CheckpointError.
        """
        self._model_dir, self._dtype = model_dir, dtype
        self._skeleton = construct(model_dir, dtype)
        self._experts = find_experts(self._skeleton)
        self._keys = _expert_keys(model_dir)
        self._lock = threading.Lock()

    def read(self, layer: LayerId, experts: Sequence[ExpertId]) -> dict[str, torch.Tensor]:
        """For each parameter of the layer's experts module its rows, [len(experts), ...], on the
        CPU. Reads no other expert's bytes. `experts` are distinct.

        Raises CheckpointError if a tensor is missing, cannot be read or has a wrong shape.
        """
        assert experts, "no expert is asked for"
        assert len(set(experts)) == len(experts), "an expert is asked for twice"
        with self._lock:
            return self._read(layer, tuple(experts))

    def _read(self, layer: LayerId, experts: tuple[ExpertId, ...]) -> dict[str, torch.Tensor]:
        module = self._experts[layer]
        names = set_num_experts(module, len(experts))
        with ExitStack() as stack:
            try:
                problems = convert(self._skeleton, self._state(layer, experts, stack), self._dtype)
            except (SafetensorError, OSError) as error:
                problems = [str(error)]
        rows = {name: getattr(module, name).data for name in names}
        set_num_experts(module, 0)  # lets go of the rows
        problems += [f"{name} is incomplete" for name in names if rows[name].is_meta]
        if problems:
            raise CheckpointError(
                f"{self._model_dir} lacks experts {list(experts)} of layer {layer}: "
                f"{'; '.join(problems[:3])}"
            )
        return rows

    def _state(
        self, layer: LayerId, experts: tuple[ExpertId, ...], stack: ExitStack
    ) -> dict[str, Any]:
        """The experts' checkpoint keys, renumbered from 0, to slices that read when indexed."""
        opened: dict[Path, Any] = {}
        state: dict[str, Any] = {}
        for match, path in self._keys.get(layer, ()):
            number = match["rest"].partition(".")[0]
            if number.isdigit() and int(number) not in experts:
                continue
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            source = opened[path].get_slice(match.group(0))
            add_expert(state, match, source, {layer: experts}, self._dtype)
        return state


def _expert_keys(model_dir: Path) -> dict[LayerId, list[tuple[re.Match[str], Path]]]:
    keys: dict[LayerId, list[tuple[re.Match[str], Path]]] = {}
    for key, path in checkpoint_files(model_dir).items():
        if match := EXPERT_KEY.match(key):
            keys.setdefault(LayerId(int(match["layer"])), []).append((match, path))
    return keys
