"""Imports worth paying for once, in the fork server. Starts no thread and touches no device."""

import contextlib
import importlib

from revivemoe.kernels.library import NoKernels, open_library


def preload() -> None:
    """Import what every rank will need, so that a forked rank runs within tens of milliseconds."""
    for name in (
        "revivemoe.executor.main",
        "transformers.models.auto.modeling_auto",
        "transformers.generation.utils",
        "transformers.core_model_loading",
    ):
        importlib.import_module(name)
    with contextlib.suppress(NoKernels):  # a rank says why
        open_library()
