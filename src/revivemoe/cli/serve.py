"""`revivemoe serve`: its flags."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from revivemoe.recovery.policy import Policy


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint in the Hugging Face layout: a directory, or ORG/NAME of the hub "
            "(fetched into its cache)."
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a model of the hub; default: main."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 or ::: all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 lets the system choose.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key clients must send, printable ASCII; default: none is needed."),
    ] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(help="Key for fault_tolerance/apply and /inject, printable ASCII."),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Model name in the API; default: ORG/NAME, or the directory's name."),
    ] = None,
    data_parallel_size: Annotated[int, typer.Option(help="Attention ranks (processes).")] = 1,
    expert_ranks: Annotated[
        int, typer.Option(help="Separate expert ranks; 0: experts on the attention ranks.")
    ] = 0,
    redundant_experts: Annotated[
        int, typer.Option(help="Extra expert replicas per MoE layer, over the whole instance.")
    ] = 0,
    spare_expert_slots: Annotated[
        int, typer.Option(help="Empty expert slots per rank and MoE layer.")
    ] = 0,
    expert_host_cache: Annotated[
        bool,
        typer.Option(
            "--expert-host-cache",
            help="Keep all experts in host memory too: lost ones are reloaded from there.",
        ),
    ] = False,
    max_missing_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of a layer's experts that may be masked, 0 up to 1; default: the policy's, "
            "and that is 1/32."
        ),
    ] = None,
    dense_ffn_tp: Annotated[
        int,
        typer.Option(help="Attention ranks that share the dense feed-forward layers, in groups."),
    ] = 1,
    num_microbatches: Annotated[
        int | None,
        typer.Option(
            help="Micro-batches per step, 1 to 8; default: 2 with --expert-ranks, else 1."
        ),
    ] = None,
    comm_backend: Annotated[str, typer.Option(help="auto, shm, gloo or nccl.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")
    ] = "auto",
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Serve a float8 checkpoint: its weights are turned back into --dtype on load.",
        ),
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Prompt plus output, tokens; default: the model's own, at most 4096."),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="Sequences running at once per rank; default: 256, or tokens of a step."),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens per rank and step; default: 512 on CPU, 8192 on CUDA."),
    ] = None,
    max_prefill_beside_decodes: Annotated[
        int,
        typer.Option(
            help="Prefill tokens per rank and step while some stream decodes; 0: what decodes can "
            "bear, by how long steps take; less while what a recovery has moved is computed again."
        ),
    ] = 0,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = 16,
    num_kv_blocks: Annotated[
        int | None, typer.Option(help="KV blocks per rank; default: by need and free memory.")
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(
            help="Arithmetic on CPU: auto (our own kernels where they are faster; built once, with "
            "a C++ compiler), native (or an error), torch."
        ),
    ] = "auto",
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="The same bits for a request whatever is computed beside it, and through a "
            "recovery; slower. CPU, float32 or bfloat16.",
        ),
    ] = False,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Compile nothing (the default on CPU).")
    ] = False,
    compilation_config: Annotated[
        str | None,
        typer.Option(
            "--compilation-config",
            "-O",
            metavar="<level|json>",
            help="0: eager. 1 to 3, or JSON with such a mode: decoder layers are compiled, "
            "once for all of them, and never again after a fault.",
        ),
    ] = None,
    compile_cache: Annotated[
        Path | None,
        typer.Option(help="Folder for what is compiled, nobody else's; default: the user's cache."),
    ] = None,
    recovery_policy: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of the recovery policy: tables experts, limits, rejoin, deadlines, "
            "detection, levels (what a device fault of a level leads to), codes (their levels)."
        ),
    ] = None,
    device_health: Annotated[
        str, typer.Option(help="auto: ask NVML if the devices are CUDA; off.")
    ] = "auto",
    kubernetes_node: Annotated[
        str | None, typer.Option(help="Kubernetes Node whose health is polled.")
    ] = None,
    enable_fault_injection: Annotated[
        bool, typer.Option("--enable-fault-injection", help="Allow fault_tolerance/inject.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of whatever the server draws itself.")] = 0,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Jinja template, or a file with one; default: the checkpoint's."),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            help="Sampling defaults: auto (the checkpoint's generation_config.json), vllm (none), "
            "or a directory with such a file, whose eos_token_id and limit max_new_tokens count, "
            "too."
        ),
    ] = "auto",
    allowed_origins: Annotated[
        str,
        typer.Option(help="JSON list of the origins whose web pages may use the API."),
    ] = '["*"]',
    timeout_keep_alive: Annotated[
        float, typer.Option(help="Seconds until an idle connection is closed.")
    ] = 75.0,
    start_timeout: Annotated[
        float,
        typer.Option(help="Seconds for all ranks to be ready at the start; then: exit status 1."),
    ] = 600.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds for open streams to end after SIGTERM or Ctrl-C; then: error. Whoever "
            "stops the server must wait 10 s longer (terminationGracePeriodSeconds, docker stop "
            "-t)."
        ),
    ] = 30.0,
) -> None:
    """Serve a Mixture-of-Experts checkpoint over an OpenAI-compatible API, through failures."""
    from dataclasses import replace
    from functools import partial

    from revivemoe.checkpoint.hub import is_hub_id, local_directory
    from revivemoe.cli.serve_run import Listen, check_before_weights, run
    from revivemoe.cli.temporary import find_temporary_directory
    from revivemoe.config import EngineConfig, check_flags, in_graphs

    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} is out of range: 0 to 65535")
    config = EngineConfig(
        model_dir=Path(model),
        served_model_name=served_model_name or (model if is_hub_id(model) else ""),
        data_parallel_size=data_parallel_size,
        expert_ranks=expert_ranks,
        dense_ffn_tp=dense_ffn_tp,
        num_microbatches=num_microbatches,
        redundant_experts=redundant_experts,
        spare_expert_slots=spare_expert_slots,
        expert_host_cache=expert_host_cache,
        comm_backend=comm_backend,
        device=device,
        dtype=dtype,
        dequantize=dequantize,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefill_tokens_beside_decodes=max_prefill_beside_decodes,
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        kernels=kernels,
        batch_invariant=batch_invariant,
        in_graphs=in_graphs(compilation_config, enforce_eager),
        compile_cache=compile_cache,
        seed=seed,
        enable_fault_injection=enable_fault_injection,
        kubernetes_node=kubernetes_node,
        device_health=device_health,
        start_timeout_s=_seconds("--start-timeout", start_timeout, 1.0),
        policy=policy_of(recovery_policy, max_missing_fraction),
    )
    listen = Listen(
        host=host,
        port=port,
        api_key=_key("--api-key", api_key),
        admin_api_key=_key("--admin-api-key", admin_api_key),
        chat_template=chat_template,
        generation_config=generation_config,
        allowed_origins=origins_of(allowed_origins),
        keep_alive_timeout_s=_seconds("--timeout-keep-alive", timeout_keep_alive, 1.0),
        shutdown_timeout_s=_seconds("--shutdown-timeout", shutdown_timeout, 0.0),
    )
    find_temporary_directory()  # libraries want one as they are loaded
    check_flags(config)
    check = partial(check_before_weights, config=config, listen=listen)
    config = replace(config, model_dir=local_directory(model, revision, check))
    status = run(config, listen)
    raise typer.Exit(status)


def _key(flag: str, key: str | None) -> str | None:
    """Raises ValueError for one that is no key, or that no client could send."""
    if key == "":
        raise ValueError(
            f"{flag} is empty (an environment variable that is not set?): give a key, or leave "
            "the flag out for a server without one"
        )
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(f"{flag} must be printable ASCII without spaces around it")
    return key


def origins_of(given: str) -> tuple[str, ...]:
    """A JSON list, as vLLM takes it, or one origin. Raises ValueError."""
    try:
        found = json.loads(given)
    except ValueError:
        found = given.split(",")
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"--allowed-origins {given!r} is no JSON list of origins")
    return tuple(one.strip() for one in found)


def _seconds(flag: str, value: float, least: float) -> float:
    if not least <= value <= 86400:
        raise ValueError(f"{flag} {value:g} is out of range: {least:g} to 86400 seconds")
    return value


def policy_of(path: Path | None, max_missing_fraction: float | None) -> "Policy":
    """The defaults, under the file, under what the command line says. Raises ValueError."""
    from dataclasses import replace

    from revivemoe.recovery.policy import Policy
    from revivemoe.recovery.policy_file import load_policy

    try:
        policy = Policy() if path is None else load_policy(path, Policy())
    except ValueError as error:
        raise ValueError(f"--recovery-policy {error}") from None
    if max_missing_fraction is None:
        return policy
    return replace(policy, max_missing_fraction=max_missing_fraction)
