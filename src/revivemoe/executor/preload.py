"""Imports worth paying for once, in the fork server. Starts no thread and touches no device."""

import importlib


def preload() -> None:
    """Import what every rank will need, so that a forked rank runs within tens of milliseconds."""
    for name in (
        "revivemoe.executor.main",
        "transformers.models.auto.modeling_auto",
        "transformers.generation.utils",
        "transformers.core_model_loading",
    ):
        importlib.import_module(name)
