"""Build a `transformers` MoE model that holds only this rank's experts, and read only those.

The model is constructed without weights; each experts module is shrunk from E experts to S slots;
the checkpoint's keys are renumbered from experts to slots; and `transformers`' own converter
(`core_model_loading`) does the renaming and merging that each family needs.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from revivemoe.checkpoint.config import read_config, text_config
from revivemoe.checkpoint.files import EXPERT_KEY, TensorInfo, tensors
from revivemoe.ids import LayerId
from revivemoe.membership.placement import EMPTY
from revivemoe.model.tensor_files import Lazy, TensorFiles, TensorSlice

ATTENTION = "revivemoe_paged"
EXPERTS = "revivemoe_dispatch"

_EXPERTS_MARKS = ("num_experts", "is_transposed", "has_bias", "_apply_gate")
"""What the experts interface of `transformers` gives every module that goes through it."""
_LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class CheckpointError(ValueError):
    """The checkpoint cannot be served; the message says what to mend."""


@dataclass(frozen=True)
class LoadedModel:
    """A model whose experts modules hold slots. `experts` maps decoder layer to experts module."""

    model: PreTrainedModel | None
    """None where only experts are loaded."""
    model_config: PreTrainedConfig
    experts: dict[LayerId, nn.Module]
    routers: dict[LayerId, tuple[nn.Module, str]]
    """Parent block and attribute name of each MoE layer's router."""
    slots_per_rank: int


def load_model(
    model_dir: Path,
    slots: dict[LayerId, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    attention: bool = True,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    num_experts: int | None = None,
) -> LoadedModel:
    """Load the dense part of `model_dir`, with `attention`, and the experts named in `slots`.

    `slots[layer]` lists the expert in each slot, or -1 for an empty slot (zeros). With
    `attention`, `prepare` is given the model before anything is read. `num_experts`: what each
    layer must have.
    Raises CheckpointError if a tensor that is needed is not there.
    """
    model = construct(model_dir, dtype)
    if attention:
        prepare(model)
    experts = find_experts(model)
    if num_experts is not None and slots:
        _refuse_other_experts(model_dir, experts, set(slots), num_experts)
    routers = {i: _find_router(model, module) for i, module in experts.items() if attention}
    config = text_config(model.config)
    num_slots = len(next(iter(slots.values()))) if slots else 0
    for module in experts.values():
        set_num_experts(module, num_slots)
    with ExitStack() as stack:
        state = _lazy_state(model_dir, config.num_hidden_layers, slots, dtype, stack)
        if not attention:
            state = {key: value for key, value in state.items() if EXPERT_KEY.match(key)}
        problems = convert(model, state, dtype)
    parts: dict[str, nn.Module] = {f"experts of layer {i}: ": m for i, m in experts.items()}
    if attention:
        parts = {"": model}
        _tie(model)
        _materialise_empty(model)
    _refuse(model_dir, problems, parts)
    for part in parts.values():
        part.to(device).eval()
    return LoadedModel(model if attention else None, config, experts, routers, num_slots)


def _refuse_other_experts(
    model_dir: Path, experts: dict[LayerId, nn.Module], layers: set[LayerId], num_experts: int
) -> None:
    """Raises CheckpointError if the model has not the layers of experts that the files have."""
    counts = {int(module.num_experts) for module in experts.values()}
    if counts != {num_experts} or layers != experts.keys():
        raise CheckpointError(
            f"{model_dir} holds {num_experts} experts in layers {sorted(layers)}, and the model "
            f"that its config.json describes has {sorted(counts)} in layers {list(experts)}: the "
            "checkpoint is incomplete, or its config.json another one's"
        )


def _refuse(model_dir: Path, problems: list[str], parts: dict[str, nn.Module]) -> None:
    """Raises CheckpointError for problems, and for what is still on meta."""
    named = " ".join(problems)
    left = [of + name for of, m in parts.items() for name, p in m.named_parameters() if p.is_meta]
    problems += [name for name in left if name not in named]
    if problems:
        raise CheckpointError(
            f"{model_dir} does not fill the model: {', '.join(sorted(problems)[:4])}"
            f"{' ...' if len(problems) > 4 else ''} (an incomplete or mismatched checkpoint?)"
        )


def find_experts(model: nn.Module) -> dict[LayerId, nn.Module]:
    """Modules that call the experts registry, by decoder layer."""
    found: dict[LayerId, nn.Module] = {}
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in _EXPERTS_MARKS):
            match = _LAYER_KEY.search(f"{name}.")
            assert match is not None, f"experts module {name} lies outside the decoder layers"
            found[LayerId(int(match.group(1)))] = module
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} has no experts module that transformers dispatches through "
            "its experts registry: only MoE models that do can be served"
        )
    return dict(sorted(found.items()))


def _find_router(model: nn.Module, experts: nn.Module) -> tuple[nn.Module, str]:
    """The sibling of an experts module whose weight has one row per expert."""
    parent = next(m for m in model.modules() if any(c is experts for c in m.children()))
    for name, child in parent.named_children():
        weight = getattr(child, "weight", None)
        is_router = isinstance(weight, torch.Tensor) and weight.shape[:1] == (experts.num_experts,)
        if child is not experts and is_router:
            return parent, name
    return parent, ""


def construct(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on meta. Raises CheckpointError.

    Patches `nn.Module` while it runs: nothing else may build a module then.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = read_config(model_dir)
        with no_init_weights(), _parameters_on_meta():
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, experts_implementation=EXPERTS,
                trust_remote_code=False,
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # others' code on the checkpoint's own values
        raise CheckpointError(_one_line(model_dir, error)) from None


def _one_line(model_dir: Path, error: Exception) -> str:
    said = " ".join(str(error).split())[:400]
    if isinstance(error, ValueError) and str(model_dir) in said:
        return said
    return f"{model_dir} cannot be built as its config.json says: {type(error).__name__}: {said}"


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters take no memory until loaded; buffers (rotary tables) are computed for real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.data.to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def set_num_experts(experts: nn.Module, count: int) -> tuple[str, ...]:
    """Give an experts module `count` experts, on meta. Id `count` is the sentinel for 'not here'.

    Returns the names of the parameters that have a row per expert.
    """
    names = experts.__dict__.setdefault("revive_rows", _names_of_rows(experts))
    for name in names:
        old = getattr(experts, name)
        empty = torch.empty(count, *old.shape[1:], dtype=old.dtype, device="meta")
        setattr(experts, name, nn.Parameter(empty, requires_grad=False))
    experts.num_experts = count
    experts._is_expert_parallel = True
    return names


def _names_of_rows(experts: nn.Module) -> tuple[str, ...]:
    params = experts.named_parameters(recurse=False)
    return tuple(name for name, p in params if p.shape[:1] == (experts.num_experts,))


def checkpoint_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Raises CheckpointError for one that cannot be read: what is missing may be none of this
    rank's.
    """
    try:
        return tensors(model_dir, complete=False)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


class _Zeros:
    """Stands for the weights of an empty slot; materialised like a safetensors slice."""

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype

    def __getitem__(self, _: object) -> torch.Tensor:
        return torch.zeros(self._shape, dtype=self._dtype)


class _SlotRows:
    """Rows of a fused [E, ...] tensor, one per slot."""

    def __init__(self, source: TensorSlice, experts: tuple[int, ...], dtype: torch.dtype) -> None:
        self._source, self._experts, self._dtype = source, experts, dtype

    def __getitem__(self, _: object) -> torch.Tensor:
        shape = self._source.get_shape()[1:]
        rows = [
            torch.zeros(shape, dtype=self._dtype) if e == EMPTY else self._source[e].to(self._dtype)
            for e in self._experts
        ]
        return torch.stack(rows) if rows else torch.zeros([0, *shape], dtype=self._dtype)


def _lazy_state(
    model_dir: Path,
    num_layers: int,
    slots: dict[LayerId, tuple[int, ...]],
    dtype: torch.dtype,
    stack: ExitStack,
) -> dict[str, Lazy]:
    """Checkpoint keys, experts renumbered to slots, to slices that read only when indexed."""
    files = TensorFiles(stack)
    state: dict[str, Lazy] = {}
    for key, tensor in checkpoint_tensors(model_dir).items():
        layer = _LAYER_KEY.search(key)
        if layer is not None and int(layer.group(1)) >= num_layers:
            continue  # multi-token-prediction layers behind the decoder
        match = EXPERT_KEY.match(key)
        if match is None:
            state[key] = files.slice(key, tensor)
        else:
            add_expert(state, match, files.slice(key, tensor), slots, dtype)
    return state


def add_expert(
    state: dict[str, Lazy],
    match: re.Match[str],
    source: TensorSlice,
    slots: dict[LayerId, tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    in_slots = slots.get(LayerId(int(match["layer"])), ())
    number, _, rest = match["rest"].partition(".")
    if not number.isdigit():
        state[match.group(0)] = _SlotRows(source, in_slots, dtype)
        return
    expert = int(number)
    if expert in in_slots:
        state[f"{match['head']}{in_slots.index(expert)}.{rest}"] = source
    if expert == 0:  # any expert's shape serves for the empty slots
        for slot, held in enumerate(in_slots):
            if held == EMPTY:
                state[f"{match['head']}{slot}.{rest}"] = _Zeros(source.get_shape(), dtype)


def _tie(model: PreTrainedModel) -> None:
    """As `from_pretrained` does it: what the class and the configuration tie is one, unless the
    checkpoint holds both and they differ; either may be the one that is there.
    """
    every = model.named_parameters(remove_duplicate=False)
    model.tie_weights(missing_keys={n for n, p in every if p.is_meta}, recompute_mapping=False)


def _materialise_empty(model: PreTrainedModel) -> None:
    """Parameters without an element, of experts modules without a slot, have nothing to read."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.is_meta and not param.numel():
                empty = torch.empty(param.shape, dtype=param.dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))


def convert(model: PreTrainedModel, state: dict[str, Lazy], dtype: torch.dtype) -> list[str]:
    """Put what `state` holds into the model, by `transformers`' own rules for its family.

    Parameters that `state` does not fill stay on meta. Returns what could not be converted.
    """
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # what has to stay in float32
        weight_mapping=get_model_conversion_mapping(model),
    )
    info, _ = convert_and_load_state_dict_in_model(model, state, config)
    wrong = [
        f"{name} has shape {list(found)} instead of {list(needed)}"
        for name, found, needed in info.mismatched_keys
    ]
    return [*info.conversion_errors, *wrong]
