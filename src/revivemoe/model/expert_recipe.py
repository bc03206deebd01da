"""How an expert's tensors in the checkpoint make up its rows in the model: learnt, then copied.

`transformers`' converter does the renaming and merging of every family, at about a third of a
millisecond a tensor: too slow for hundreds of experts that streams wait for. So it is shown one
expert of random numbers, and where each of its tensors turns up in the result is what all others
need. A family whose layout is not made of whole tensors side by side has no recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Rows = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """One tensor of an expert, and the part of a parameter's row that it fills."""

    source: str
    shape: tuple[int, ...]
    param: str
    dim: int
    offset: int
    transposed: bool

    def place(self, row: torch.Tensor) -> torch.Tensor | None:
        """Where the tensor lies in the parameter's row, if it lies there as it is."""
        if self.transposed:
            return None
        return row.narrow(self.dim, self.offset, self.shape[self.dim])

    def fill(self, row: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy into the parameter's row, with the row's dtype and device.

        Raises RuntimeError for a tensor of another shape than the one that was learnt.
        """
        if tuple(tensor.shape) != self.shape:
            raise RuntimeError(
                f"{self.source} has shape {list(tensor.shape)} instead of {list(self.shape)}"
            )
        tensor = tensor.T if self.transposed else tensor
        row.narrow(self.dim, self.offset, tensor.shape[self.dim]).copy_(tensor)


Recipe = tuple[Piece, ...]


def learn(sources: Rows, rows: Rows) -> Recipe | None:
    """The recipe by which `sources` (by name) have become `rows` (by parameter), if there is one:
    every source is somewhere, exactly once, and nothing else is there.

    The numbers must be such that no two pieces look alike.
    """
    pieces = []
    for name, tensor in sources.items():
        found = [p for param, row in rows.items() for p in _places(name, tensor, param, row)]
        if len(found) != 1:
            return None
        pieces.append(found[0])
    filled = sum(tensor.numel() for tensor in sources.values())
    return tuple(pieces) if filled == sum(row.numel() for row in rows.values()) else None


def _places(name: str, tensor: torch.Tensor, param: str, row: torch.Tensor) -> list[Piece]:
    """Every place in a row where a tensor, or its transpose, lies as a whole."""
    found = []
    for transposed in (False, True) if tensor.dim() == 2 else (False,):
        wanted = tensor.T if transposed else tensor
        if wanted.dim() != row.dim():
            continue
        dims = [d for d in range(row.dim()) if _fits(wanted, row, d)]
        if wanted.shape == row.shape:
            dims = dims[:1]
        for dim in dims:
            size = wanted.shape[dim]
            for offset in range(0, row.shape[dim] - size + 1, size):
                if torch.equal(row.narrow(dim, offset, size), wanted):
                    shape = tuple(tensor.shape)
                    found.append(Piece(name, shape, param, dim, offset, transposed))
    return found


def _fits(wanted: torch.Tensor, row: torch.Tensor, dim: int) -> bool:
    others = [d for d in range(row.dim()) if d != dim]
    same = all(wanted.shape[d] == row.shape[d] for d in others)
    return same and wanted.shape[dim] <= row.shape[dim]


def copy_rows(rows: Rows, to: Rows) -> None:
    """All of them, or none; of any dtype and device."""
    assert rows.keys() == to.keys(), f"{sorted(rows)} for {sorted(to)}"
    assert all(rows[name].shape == row.shape for name, row in to.items())
    for name, row in to.items():
        row.copy_(rows[name])
