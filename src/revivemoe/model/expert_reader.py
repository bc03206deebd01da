"""Read single experts of a checkpoint beside a live model, converted as `load_model` does it.

`transformers`' converter wants a model to put its results into. The reader keeps one of its own
whose parameters are all on the meta device; for a read, one experts module of it is given as many
experts as are read. Nothing is shared with the model that runs.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from revivemoe.checkpoint.files import EXPERT_KEY, TensorInfo
from revivemoe.ids import ExpertId, LayerId
from revivemoe.model.expert_recipe import Recipe, copy_rows, learn
from revivemoe.model.load import (
    CheckpointError,
    add_expert,
    checkpoint_tensors,
    construct,
    convert,
    find_experts,
    set_num_experts,
)
from revivemoe.model.tensor_files import Lazy, TensorFiles, TensorSlice

Write = Callable[[Mapping[str, torch.Tensor]], None]
"""Writes an expert's share of each parameter."""
Signature = frozenset[tuple[str, tuple[int, ...]]]
"""Names and shapes of one expert's tensors."""


class _Fake:
    """Stands for a tensor of the checkpoint; materialised like a safetensors slice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._tensor[index]


class ExpertReader:
    """Reads converted rows of experts. Threads may share one: conversions take turns."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        """Builds the skeleton. Not while another thread builds or runs a model: construction
        patches `nn.Module` for as long as it lasts. Raises CheckpointError.
        """
        self._model_dir, self._dtype = model_dir, dtype
        self._skeleton = construct(model_dir, dtype)
        self._experts = find_experts(self._skeleton)
        self._keys = _expert_keys(model_dir)
        self._lock = threading.Lock()
        self._recipes: dict[Signature, Recipe | None] = {}
        """Learnt at the first read; None: the converter must do it."""

    def read(self, layer: LayerId, experts: Sequence[ExpertId]) -> dict[str, torch.Tensor]:
        """For each parameter of the layer's experts module its rows, [len(experts), ...], on the
        CPU. Reads no other expert's bytes. `experts` are distinct.

        Raises CheckpointError if a tensor is missing, cannot be read or has a wrong shape.
        """
        assert experts, "no expert is asked for"
        assert len(set(experts)) == len(experts), "an expert is asked for twice"
        rows = {
            name: torch.empty(len(experts), *shape, dtype=dtype)
            for name, (shape, dtype) in self._shapes(layer).items()
        }
        with ExitStack() as stack:
            for at, (_, write) in enumerate(self.each(layer, experts, TensorFiles(stack))):
                write({name: of_all[at] for name, of_all in rows.items()})
        return rows

    def each(
        self, layer: LayerId, experts: Sequence[ExpertId], files: TensorFiles
    ) -> Iterator[tuple[ExpertId, Write]]:
        """The same, one expert after another, in the order asked for: each with what writes its
        rows to where they are to lie, on any device, before the next is asked for. That raises
        CheckpointError, too, and then some of it may be written. `files`: what is opened stays
        open.
        """
        with self._lock:
            recipe = self._recipe(layer, experts[0], files)
            converted = {} if recipe is not None else self._read(layer, tuple(experts))
        for at, expert in enumerate(experts):
            if recipe is not None:
                yield expert, partial(self._copy, layer, expert, recipe, files)
            else:
                yield expert, partial(copy_rows, {n: rows[at] for n, rows in converted.items()})

    def _recipe(self, layer: LayerId, expert: ExpertId, files: TensorFiles) -> Recipe | None:
        """Layers whose experts have tensors of the same names and shapes share one."""
        signature = frozenset((n, t.shape) for n, t, _ in self._named(layer, (expert,)))
        if signature not in self._recipes:
            self._recipes[signature] = self._learn(layer, expert, files)
        return self._recipes[signature]

    def _learn(self, layer: LayerId, expert: ExpertId, files: TensorFiles) -> Recipe | None:
        """Show the converter random numbers in the place of one expert."""
        fakes: dict[str, torch.Tensor] = {}
        state: dict[str, Lazy] = {}
        try:
            for name, source, match in self._sources(layer, (expert,), files):
                shape = source.get_shape()
                fused = not match["rest"].partition(".")[0].isdigit()
                fakes[name] = torch.randn(shape[1:] if fused else shape, dtype=self._dtype)
                fake = _Fake(fakes[name][None] if fused else fakes[name])
                add_expert(state, match, fake, {layer: (0 if fused else expert,)}, self._dtype)
        except (SafetensorError, OSError):
            return None
        rows, problems = self._convert(layer, 1, state)
        if problems or any(row.is_meta for row in rows.values()):
            return None
        return learn(fakes, {name: row[0] for name, row in rows.items()})

    def _copy(
        self,
        layer: LayerId,
        expert: ExpertId,
        recipe: Recipe,
        files: TensorFiles,
        rows: Mapping[str, torch.Tensor],
    ) -> None:
        pieces = {piece.source: piece for piece in recipe}
        try:
            for name, tensor, match in self._named(layer, (expert,)):
                piece, alone = pieces.pop(name), match["rest"].partition(".")[0].isdigit()
                place, key = piece.place(rows[piece.param]), match.group(0)
                row = None if alone else expert
                if place is None or not files.read_into(place, key, tensor, row):
                    source = files.slice(key, tensor)
                    piece.fill(rows[piece.param], source[:] if alone else source[expert])
        except (SafetensorError, OSError, RuntimeError, LookupError, TypeError) as error:
            raise self._incomplete(layer, [expert], [str(error)]) from None
        if pieces:
            raise self._incomplete(layer, [expert], [f"{len(pieces)} tensors are not there"])

    def _shapes(self, layer: LayerId) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        module = self._experts[layer]
        params = {name: getattr(module, name) for name in set_num_experts(module, 0)}
        return {name: (tuple(p.shape[1:]), p.dtype) for name, p in params.items()}

    def _incomplete(
        self, layer: LayerId, experts: Sequence[ExpertId], problems: Sequence[str]
    ) -> CheckpointError:
        return CheckpointError(
            f"{self._model_dir} lacks experts {list(experts)} of layer {layer}: "
            f"{'; '.join(problems[:3])}"
        )

    def _read(self, layer: LayerId, experts: tuple[ExpertId, ...]) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            try:
                state: dict[str, Lazy] = {}
                for _, source, match in self._sources(layer, experts, TensorFiles(stack)):
                    add_expert(state, match, source, {layer: experts}, self._dtype)
                rows, problems = self._convert(layer, len(experts), state)
            except (SafetensorError, OSError) as error:
                raise self._incomplete(layer, experts, [str(error)]) from None
        problems += [f"{name} is incomplete" for name, row in rows.items() if row.is_meta]
        if problems:
            raise self._incomplete(layer, experts, problems)
        return rows

    def _convert(
        self, layer: LayerId, count: int, state: dict[str, Lazy]
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Rows of `count` experts, renumbered from 0, and what was wrong."""
        module = self._experts[layer]
        names = set_num_experts(module, count)
        try:
            problems = convert(self._skeleton, state, self._dtype)
            return {name: getattr(module, name).data for name in names}, problems
        finally:
            set_num_experts(module, 0)  # lets go of the rows

    def _sources(
        self, layer: LayerId, experts: tuple[ExpertId, ...], files: TensorFiles
    ) -> Iterator[tuple[str, TensorSlice, re.Match[str]]]:
        """The same, with the slice that reads when indexed."""
        for name, tensor, match in self._named(layer, experts):
            yield name, files.slice(match.group(0), tensor), match

    def _named(
        self, layer: LayerId, experts: tuple[ExpertId, ...]
    ) -> Iterator[tuple[str, TensorInfo, re.Match[str]]]:
        """Each tensor with some of the experts in it: its name within an expert, what it is, and
        what was matched.
        """
        keys = self._keys.get(layer, {})
        for expert in (None, *experts):
            for match, tensor in keys.get(expert, ()):
                rest = match["rest"]
                yield rest if expert is None else rest.partition(".")[2], tensor, match


Keys = dict[ExpertId | None, list[tuple[re.Match[str], TensorInfo]]]
"""By expert; None: tensors that hold all of them."""


def _expert_keys(model_dir: Path) -> dict[LayerId, Keys]:
    keys: dict[LayerId, Keys] = {}
    for key, tensor in checkpoint_tensors(model_dir).items():
        if match := EXPERT_KEY.match(key):
            number = match["rest"].partition(".")[0]
            expert = ExpertId(int(number)) if number.isdigit() else None
            of_layer = keys.setdefault(LayerId(int(match["layer"])), {})
            of_layer.setdefault(expert, []).append((match, tensor))
    return keys
