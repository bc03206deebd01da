"""`revivemoe precompile`."""

from pathlib import Path
from typing import Annotated

import typer


def precompile(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    data_parallel_size: Annotated[
        int, typer.Option(help="Attention ranks: code is made for the threads that each will have.")
    ] = 1,
    expert_ranks: Annotated[int, typer.Option(help="Ranks for experts alone.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    dequantize: Annotated[bool, typer.Option(help="As of serve.")] = False,
    kernels: Annotated[str, typer.Option(help="auto, native or torch, as of serve.")] = "auto",
    compile_cache: Annotated[
        Path | None,
        typer.Option(help="Folder for what is compiled, nobody else's; default: the user's cache."),
    ] = None,
) -> None:
    """Compile a model's layers ahead, for serve -O1: with the flags that it will have.

    The graphs know nothing of ranks, experts or roles: they do for a whole deployment, and for what
    is left of it after a fault.
    """
    from revivemoe.checkpoint.inspect import inspect_checkpoint
    from revivemoe.cluster.compiler import provide_kernels
    from revivemoe.config import EngineConfig, resolve
    from revivemoe.executor.precompile import precompile as compile_ahead
    from revivemoe.ids import Incarnation, RankId
    from revivemoe.kernels.library import NoKernels
    from revivemoe.membership.membership import Membership
    from revivemoe.membership.placement import place
    from revivemoe.serving.specs import rank_spec

    config = EngineConfig(
        model_dir=Path(model),
        data_parallel_size=data_parallel_size,
        expert_ranks=expert_ranks,
        dtype=dtype,
        dequantize=dequantize,
        kernels=kernels,
        in_graphs=True,
        compile_cache=compile_cache,
    )
    info = inspect_checkpoint(config.model_dir, dequantize=dequantize)
    config = resolve(config, info)
    topology = config.topology()
    home = Membership(topology, place(info.num_experts, info.moe_layers, topology.experts))
    spec = rank_spec(config, info, home, RankId(0), Incarnation(1), ())
    typer.echo("compiling: half a minute, if nobody has done so before ...", err=True)
    if kernels != "torch":
        provide_kernels()
    try:
        told = compile_ahead(spec, config.compile_folders)
    except NoKernels as error:
        raise ValueError(f"--kernels {kernels}: {error}") from None
    typer.echo(f"graphs: {told}")
    if told.startswith("none"):
        raise typer.Exit(1)
