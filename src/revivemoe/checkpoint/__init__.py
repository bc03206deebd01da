"""Random-weight checkpoints in the Hugging Face layout, made offline."""

from revivemoe.checkpoint.make import make_model
from revivemoe.checkpoint.presets import ARCHS, PRESETS

__all__ = ["ARCHS", "PRESETS", "make_model"]
