"""Checkpoints for benches: made on the spot, in the dtype that is measured."""

from pathlib import Path

from rich.console import Console

from revivemoe.checkpoint.inspect import inspect_checkpoint


def bench_model(
    folder: Path, preset: str, dtype: str, console: Console, arch: str = "qwen3_moe"
) -> tuple[Path, int]:
    """Make a checkpoint below `folder`; returns its directory and its experts per layer."""
    from revivemoe.checkpoint.make import make_model

    directory = folder / f"{arch}-{preset}"
    console.print(f"making {arch} {preset} ({dtype}) ...")
    make_model(directory, arch, preset, 0, dtype)
    return directory, inspect_checkpoint(directory).num_experts
