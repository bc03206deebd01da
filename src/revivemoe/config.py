"""What an instance is asked to be, checked before anything is started."""

import json
import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.host.cores import usable_cores
from revivemoe.ids import Epoch
from revivemoe.membership.dense_groups import DenseGroups, form_groups
from revivemoe.membership.topology import Topology, default_microbatches, deployment
from revivemoe.recovery.policy import Policy

FIRST_EPOCH = Epoch(1)
KERNELS = ("auto", "native", "torch")
MAX_MICROBATCHES = 8
NODE_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
"""DNS subdomain, as Kubernetes asks of the name of a Node."""


@dataclass(frozen=True)
class EngineConfig:
    """One field per `serve` flag; `auto` values are resolved by `resolve`."""

    model_dir: Path
    served_model_name: str = ""
    data_parallel_size: int = 1
    """Attention ranks."""
    expert_ranks: int = 0
    """Ranks for experts alone; 0: experts live on the attention ranks."""
    dense_ffn_tp: int = 1
    """Ranks that share a dense feed-forward layer."""
    num_microbatches: int | None = None
    """Into which a step is cut; None: what suits the deployment."""
    redundant_experts: int = 0
    spare_expert_slots: int = 0
    expert_host_cache: bool = False
    comm_backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    dequantize: bool = False
    """Float8 weights are welcome: they are turned back into `dtype` on load."""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    prefill_tokens_beside_decodes: int = 0
    """0: by what steps cost (`core.pace`)."""
    block_size: int = 16
    num_kv_blocks: int | None = None
    longest_sequences: int = 32
    """That KV blocks which are not counted out are for, at most: `--max-num-seqs` if it is said."""
    kernels: str = "auto"
    """Ours where they are the faster ones, ours or an error, or torch's."""
    batch_invariant: bool = False
    in_graphs: bool = False
    """Decoder layers are compiled (`model.graphs`)."""
    compile_cache: Path | None = None
    """Where; None: in the user's cache directory."""
    seed: int = 0
    enable_fault_injection: bool = False
    kubernetes_node: str | None = None
    """Node whose health is polled."""
    device_health: str = "auto"
    """auto: ask NVML if the devices are CUDA; off: ask no device."""
    start_timeout_s: float = 600.0
    policy: Policy = field(default_factory=Policy)

    @property
    def compile_folders(self) -> list[Path]:
        """Where graphs may be kept, the best first."""
        if self.compile_cache is not None:
            return [self.compile_cache]
        return [folder / "graphs" for folder in cache_folders()]

    @property
    def num_cuda_devices(self) -> int:
        return count_cuda_devices()

    def rank_device(self, rank: int) -> str:
        """Device of one rank: ranks go round the GPUs of the host."""
        return f"cuda:{rank % self.num_cuda_devices}" if self.device == "cuda" else "cpu"

    @property
    def threads_per_rank(self) -> int:
        """Ranks of one host share its cores; more threads than cores would fight."""
        return max(1, usable_cores() // self.num_ranks)

    @property
    def num_ranks(self) -> int:
        return self.data_parallel_size + self.expert_ranks

    def dense_groups(self) -> DenseGroups | None:
        """Those that share the dense layers; None: every attention rank holds all of them.

        Raises ValueError if there are too few ranks for one.
        """
        if self.dense_ffn_tp == 1:
            return None
        return form_groups(self.topology().attention, self.dense_ffn_tp)

    def topology(self) -> Topology:
        """What the instance starts with."""
        return deployment(FIRST_EPOCH, self.data_parallel_size, self.expert_ranks)


def count_cuda_devices() -> int:
    """GPUs of this host that CUDA_VISIBLE_DEVICES leaves visible, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if visible is None:
        return present
    return min(present, len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))


def cuda_device_id(index: int) -> int | str:
    """What `cuda:index` is outside this process: NVML's index of it, or its UUID.

    CUDA_VISIBLE_DEVICES renumbers devices and NVML does not look at it. (Without
    CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA may order unlike GPUs of one host in another way.)
    """
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index >= len(visible) or not visible[index]:
        return index
    return int(visible[index]) if visible[index].isdecimal() else visible[index]


SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def this_pod() -> tuple[str, str] | None:
    """Namespace and name of the Kubernetes pod that this process runs in; None if it is in none.

    POD_NAMESPACE and POD_NAME, as the downward API sets them, come first. Without them: the
    namespace of the service account, and the host's name (which is the Node's with hostNetwork).
    """
    name = os.environ.get("POD_NAME") or os.environ.get("HOSTNAME")
    namespace = os.environ.get("POD_NAMESPACE")
    if not namespace:
        try:
            namespace = (SERVICE_ACCOUNT / "namespace").read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
    return (namespace, name) if namespace and name else None


MAX_SEQS = 256
"""At once on a rank, as elsewhere; or as many as a step has tokens."""
MAX_TOKENS = {"cpu": 512, "cuda": 8192}
"""Of a step on a rank: where a device has enough to do; more only let others wait."""


def resolve(config: EngineConfig, info: CheckpointInfo) -> EngineConfig:
    """Replace every `auto`, and check the flags against the checkpoint and the machine.

    Raises ValueError: one line that says what is wrong and how to mend it.
    """
    _check_positive(config)
    device = _device(config)
    max_model_len = config.max_model_len or min(info.max_positions, 4096)
    if max_model_len > info.max_positions:
        raise ValueError(
            f"--max-model-len {max_model_len} is more than the {info.max_positions} positions "
            f"the model was made for{info.positions_end}: lower it"
        )
    topology = config.topology()
    holders = len(topology.experts)
    if holders > info.num_experts:
        flag = "--expert-ranks" if config.expert_ranks else "--data-parallel-size"
        raise ValueError(
            f"{flag} {holders} is more ranks than the "
            f"{info.num_experts} experts of a layer: every rank must hold at least one; lower it"
        )
    most = info.num_experts * (holders - 1)
    if config.redundant_experts > most:
        raise ValueError(
            f"--redundant-experts {config.redundant_experts} is more than {info.num_experts} "
            f"experts on {holders} ranks can use ({most}): lower it"
        )
    _check_dense(config, info)
    max_tokens = config.max_num_batched_tokens or MAX_TOKENS[device]
    max_seqs = config.max_num_seqs or min(MAX_SEQS, max_tokens)
    if max_tokens < max_seqs:
        raise ValueError(
            f"--max-num-batched-tokens {max_tokens} is below --max-num-seqs {max_seqs}: running "
            "sequences could not all decode in one step"
        )
    return replace(
        config,
        served_model_name=config.served_model_name or config.model_dir.resolve().name,
        device=device,
        max_num_seqs=max_seqs,
        longest_sequences=config.max_num_seqs or config.longest_sequences,
        max_num_batched_tokens=max_tokens,
        dtype=info.dtype if config.dtype == "auto" else config.dtype,
        comm_backend=_backend(config, device),
        num_microbatches=config.num_microbatches or default_microbatches(topology),
        max_model_len=max_model_len,
    )


def check_flags(config: EngineConfig) -> None:
    """What can be said of the flags without a checkpoint. Raises ValueError, as `resolve` does."""
    _check_positive(config)
    _backend(config, _device(config))


def _check_dense(config: EngineConfig, info: CheckpointInfo) -> None:
    shards = config.dense_ffn_tp
    if shards == 1:
        return
    if not info.dense_layers:
        raise ValueError(
            f"--dense-ffn-tp {shards}, but {info.model_dir} ({info.architecture}) has no dense "
            "feed-forward layers: leave it at 1"
        )
    if info.dense_width % shards:
        raise ValueError(
            f"--dense-ffn-tp {shards} does not divide the dense layers' width {info.dense_width}"
        )
    config.dense_groups()


def _check_positive(config: EngineConfig) -> None:
    for flag, value, least in (
        ("--data-parallel-size", config.data_parallel_size, 1),
        ("--expert-ranks", config.expert_ranks, 0),
        ("--num-microbatches", config.num_microbatches, 1),
        ("--dense-ffn-tp", config.dense_ffn_tp, 1),
        ("--redundant-experts", config.redundant_experts, 0),
        ("--spare-expert-slots", config.spare_expert_slots, 0),
        ("--max-model-len", config.max_model_len, 2),
        ("--max-num-seqs", config.max_num_seqs, 1),
        ("--max-num-batched-tokens", config.max_num_batched_tokens, 1),
        ("--max-prefill-beside-decodes", config.prefill_tokens_beside_decodes, 0),
        ("--block-size", config.block_size, 1),
        ("--num-kv-blocks", config.num_kv_blocks, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} is out of range: at least {least}")
    if (config.num_microbatches or 1) > MAX_MICROBATCHES:
        raise ValueError(
            f"--num-microbatches {config.num_microbatches} is out of range: at most "
            f"{MAX_MICROBATCHES}"
        )
    fraction = config.policy.max_missing_fraction
    if not 0 <= fraction < 1:
        raise ValueError(f"--max-missing-fraction {fraction} is out of range: 0 up to below 1")
    for flag, value_str, known in (
        ("--comm-backend", config.comm_backend, ("auto", "shm", "gloo", "nccl")),
        ("--device", config.device, ("auto", "cpu", "cuda")),
        ("--dtype", config.dtype, ("auto", "float32", "bfloat16", "float16")),
        ("--kernels", config.kernels, KERNELS),
        ("--device-health", config.device_health, ("auto", "off")),
    ):
        if value_str not in known:
            raise ValueError(f"{flag} {value_str!r} is unknown: choose one of {', '.join(known)}")
    if config.batch_invariant and (config.dense_ffn_tp > 1 or config.kernels == "torch"):
        raise ValueError("--batch-invariant excludes --dense-ffn-tp and --kernels torch")
    if config.in_graphs and (config.batch_invariant or config.dense_ffn_tp > 1):
        raise ValueError(
            "graphs exclude --batch-invariant (a compiler decides how it adds up) and "
            "--dense-ffn-tp: leave --compilation-config out"
        )
    node = config.kubernetes_node
    if node is not None and not NODE_NAME.fullmatch(node):
        raise ValueError(
            f"--kubernetes-node {node!r} is no name of a Node: lower-case letters, digits, - and ."
        )


def _device(config: EngineConfig) -> str:
    available = count_cuda_devices()
    if config.device == "cuda" and not available:
        raise ValueError("--device cuda, but this host shows no CUDA device: use --device cpu")
    if config.device == "auto":
        return "cuda" if available else "cpu"
    return config.device


def _backend(config: EngineConfig, device: str) -> str:
    enough = count_cuda_devices() >= config.num_ranks
    if config.comm_backend == "auto":
        if device == "cpu":
            return "shm"
        return "nccl" if enough else "gloo"
    if config.comm_backend == "nccl" and device != "cuda":
        raise ValueError("--comm-backend nccl needs --device cuda: use shm or gloo")
    if config.comm_backend == "nccl" and not enough:
        raise ValueError(
            f"--comm-backend nccl needs a GPU for each of {config.num_ranks} ranks, and "
            f"this host shows {count_cuda_devices()}: use --comm-backend gloo"
        )
    return config.comm_backend


def in_graphs(compilation: str | None, enforce_eager: bool) -> bool:
    """Whether layers are compiled: `--compilation-config`, as vLLM has it, a level or JSON with a
    `mode`. Raises ValueError for what is not known, or contradicts itself.
    """
    mode = _compilation_mode(compilation)
    if enforce_eager and mode:
        raise ValueError(
            f"--enforce-eager and --compilation-config {compilation} exclude each other"
        )
    return mode > 0


def _compilation_mode(compilation: str | None) -> int:
    if compilation is None:
        return 0
    try:
        given = json.loads(compilation)
    except ValueError:
        given = None
    if isinstance(given, dict) and given.keys() <= {"mode", "level"} and len(given) == 1:
        (given,) = given.values()
    if type(given) is not int or not 0 <= given <= 3:
        raise ValueError(
            f"--compilation-config {compilation}: a level from 0 (eager) to 3, or JSON with one as "
            '"mode", is all that is known here'
        )
    return given


def cache_folders() -> list[Path]:
    """Where what is built once may be kept, the best first."""
    if named := os.environ.get("REVIVEMOE_CACHE_DIR"):
        return [Path(named)]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(home) / "revivemoe", Path(tempfile.gettempdir()) / f"revivemoe-{os.getuid()}"]


def compilers() -> list[str]:
    """C++ compilers to look for."""
    return [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
