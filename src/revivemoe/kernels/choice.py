"""Which arithmetic a rank computes with: as it was told, and as the machine has it."""

from dataclasses import dataclass

import torch

from revivemoe.kernels.library import NoKernels
from revivemoe.kernels.native import DTYPES, Native
from revivemoe.kernels.rows import NativeRows


@dataclass(frozen=True)
class Chosen:
    native: Native | None
    rows: NativeRows | None
    """None: torch's own throughout."""
    told: str
    """For people: which, or why not ours."""


def choose(wanted: str, device: torch.device, dtype: torch.dtype) -> Chosen:
    """`wanted`: auto, native or torch. Raises NoKernels if ours are wanted and cannot be had."""
    if wanted == "torch":
        return Chosen(None, None, "torch")
    try:
        if device.type != "cpu" or dtype not in DTYPES:
            raise NoKernels(f"there are none for {str(dtype).removeprefix('torch.')} on {device}")
        return Chosen(Native(), NativeRows(), "native")
    except NoKernels as error:
        if wanted == "native":
            raise
        return Chosen(None, None, f"torch ({error})")
