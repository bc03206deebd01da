from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from revivemoe import config as config_module
from revivemoe.checkpoint.inspect import CheckpointInfo
from revivemoe.config import EngineConfig, cuda_device_id, resolve
from revivemoe.host.cores import usable_cores
from revivemoe.recovery.policy import Policy

INFO = CheckpointInfo(
    model_dir=Path("/models/some"),
    architecture="SomeMoe",
    dtype="bfloat16",
    vocab_size=512,
    hidden_size=64,
    max_positions=8192,
    top_k=4,
    num_experts=16,
    moe_layers=(0, 1),
    eos_token_ids=(2,),
)
CONFIG = EngineConfig(model_dir=Path("/models/some"))


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many CUDA devices this host shows."""
    shown = {"count": 0}
    monkeypatch.setattr(config_module, "count_cuda_devices", lambda: shown["count"])
    return shown


@pytest.mark.parametrize(
    ("field", "value", "flag", "mend"),
    [
        ("data_parallel_size", 0, "--data-parallel-size 0", "at least 1"),
        ("data_parallel_size", 17, "--data-parallel-size 17", "lower it"),
        ("redundant_experts", -1, "--redundant-experts -1", "at least 0"),
        ("spare_expert_slots", -1, "--spare-expert-slots -1", "at least 0"),
        ("max_model_len", 1, "--max-model-len 1", "at least 2"),
        ("max_model_len", 0, "--max-model-len 0", "at least 2"),
        ("max_model_len", 8193, "--max-model-len 8193", "lower it"),
        ("max_num_seqs", 0, "--max-num-seqs 0", "at least 1"),
        ("max_num_batched_tokens", 0, "--max-num-batched-tokens 0", "at least 1"),
        ("prefill_tokens_beside_decodes", -1, "--max-prefill-beside-decodes -1", "at least 0"),
        ("block_size", 0, "--block-size 0", "at least 1"),
        ("num_kv_blocks", 0, "--num-kv-blocks 0", "at least 1"),
        ("comm_backend", "mpi", "--comm-backend 'mpi'", "auto, shm, gloo, nccl"),
        ("comm_backend", "nccl", "--comm-backend nccl", "use shm or gloo"),
        ("device", "tpu", "--device 'tpu'", "auto, cpu, cuda"),
        ("device", "cuda", "--device cuda", "use --device cpu"),
        ("dtype", "int4", "--dtype 'int4'", "auto, float32, bfloat16"),
        ("device_health", "on", "--device-health 'on'", "auto, off"),
        ("kubernetes_node", "", "--kubernetes-node ''", "lower-case"),
        ("kubernetes_node", "../pods", "--kubernetes-node '../pods'", "lower-case"),
    ],
)
def test_each_bad_flag_is_named_with_its_mend(field: str, value: Any, flag: str, mend: str) -> None:
    with pytest.raises(ValueError, match=flag) as raised:
        resolve(replace(CONFIG, **{field: value}), INFO)
    message = str(raised.value)
    assert message.startswith(flag)
    assert mend in message
    assert "\n" not in message


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range(fraction: float) -> None:
    policy = Policy(max_missing_fraction=fraction)
    with pytest.raises(ValueError, match=r"--max-missing-fraction .* 0 up to below 1"):
        resolve(replace(CONFIG, policy=policy), INFO)


def test_nccl_wants_a_gpu_for_each_rank(gpus: dict[str, int]) -> None:
    gpus["count"] = 1
    asked = replace(CONFIG, comm_backend="nccl", device="cuda", data_parallel_size=2)
    with pytest.raises(ValueError, match=r"a GPU for each of 2 ranks.* use --comm-backend gloo"):
        resolve(asked, INFO)


def test_auto_becomes_something() -> None:
    resolved = resolve(CONFIG, INFO)
    assert resolved.served_model_name == "some"
    assert resolved.device == "cpu"
    assert resolved.comm_backend == "shm"
    assert resolved.dtype == "bfloat16"
    assert resolved.max_model_len == 4096
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == (256, 512)
    assert resolve(CONFIG, replace(INFO, max_positions=100)).max_model_len == 100


def test_as_many_sequences_as_a_step_has_tokens() -> None:
    few = resolve(replace(CONFIG, max_num_batched_tokens=31), INFO)
    assert few.max_num_seqs == 31
    with pytest.raises(ValueError, match="--max-num-batched-tokens 31 is below --max-num-seqs 32"):
        resolve(replace(CONFIG, max_num_batched_tokens=31, max_num_seqs=32), INFO)


def test_why_a_text_may_not_be_longer() -> None:
    info = replace(INFO, max_positions=100, positions_end="; beyond them longrope ...")
    with pytest.raises(ValueError, match="100 positions the model was made for; beyond them long"):
        resolve(replace(CONFIG, max_model_len=101), info)


def test_what_is_said_stays() -> None:
    said = replace(
        CONFIG, served_model_name="m", comm_backend="gloo", dtype="float32", max_model_len=8192,
        max_num_seqs=8, max_num_batched_tokens=64,
    )  # fmt: skip
    resolved = resolve(said, INFO)
    assert resolved == replace(said, device="cpu", num_microbatches=1, longest_sequences=8)


@pytest.mark.parametrize(
    ("devices", "ranks", "backend"), [(0, 2, "shm"), (1, 2, "gloo"), (2, 2, "nccl")]
)
def test_the_backend_follows_the_devices(
    gpus: dict[str, int], devices: int, ranks: int, backend: str
) -> None:
    gpus["count"] = devices
    resolved = resolve(replace(CONFIG, data_parallel_size=ranks), INFO)
    assert resolved.comm_backend == backend
    assert [resolved.rank_device(r) for r in range(2)] == {
        0: ["cpu", "cpu"],
        1: ["cuda:0", "cuda:0"],
        2: ["cuda:0", "cuda:1"],
    }[devices]


def test_ranks_share_the_cores() -> None:

    cores = usable_cores()
    assert CONFIG.threads_per_rank == cores
    assert replace(CONFIG, data_parallel_size=10 * cores).threads_per_rank == 1


@pytest.mark.parametrize(
    ("visible", "index", "known_to_nvml"),
    [
        (None, 1, 1),
        ("2,3", 1, 3),
        (" 2 , GPU-0a1b ", 1, "GPU-0a1b"),
        ("", 0, 0),
        ("5", 1, 1),
    ],
)
def test_a_cuda_device_is_found_behind_the_visible_ones(
    visible: str | None, index: int, known_to_nvml: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_device_id(index) == known_to_nvml
