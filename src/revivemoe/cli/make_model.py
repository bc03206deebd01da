"""`revivemoe make-model`."""

from pathlib import Path
from typing import Annotated

import typer


def make_model_command(
    directory: Annotated[Path, typer.Argument(help="Where to write it; must be empty or new.")],
    arch: Annotated[
        str, typer.Option(help="qwen3_moe, mixtral, olmoe, deepseek_v3 or glm4_moe.")
    ] = "qwen3_moe",
    preset: Annotated[
        str, typer.Option(help="tiny (< 1 M parameters), small (~110 M) or medium (~1 B).")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Make a random-weight MoE checkpoint with a tokenizer and chat template. Works offline."""
    import sys

    from revivemoe.checkpoint.make import make_model

    def progress(message: str) -> None:
        sys.stderr.write(f"make-model: {message}\n")

    make_model(directory, arch, preset, seed, dtype, progress)
    sys.stderr.write(f"make-model: {arch} {preset} is in {directory}\n")
