"""Runs one rank's share of a step, in the roles the rank has.

A rank with the attention role has a `Generator`; every rank has an `ExpertWorker`, with no slots
if it has not the expert role. An attention rank can become an expert rank.
"""

import ctypes
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from revivemoe.comm.dispatch import Dispatcher
from revivemoe.core.microbatches import split
from revivemoe.core.slots import ExpertSlots
from revivemoe.core.step import Batch, StepResult
from revivemoe.ids import LayerId, RankId
from revivemoe.kernels.choice import choose
from revivemoe.kernels.native import Native
from revivemoe.membership.membership import Membership
from revivemoe.model.dense import DenseLayer, DenseReader, replace_dense
from revivemoe.model.expert_worker import ExpertWorker
from revivemoe.model.experts import ExpertExchange, MoeLayer, dispatched_experts
from revivemoe.model.finite import NonFiniteStep
from revivemoe.model.generator import Generator
from revivemoe.model.graphs import Graphs
from revivemoe.model.load import ATTENTION, EXPERTS, LoadedModel, load_model
from revivemoe.model.paged import paged_attention


def register_hooks() -> None:
    """Make our attention and experts known to `transformers`. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, dispatched_experts)


@dataclass(frozen=True)
class DenseSpec:
    """Dense layers that are shared, and what of them this rank starts with."""

    layers: tuple[LayerId, ...]
    num_shards: int
    shards: tuple[int, ...]


NOT_SHARED = DenseSpec((), 1, ())


class ModelRunner:
    """The model of one rank. Construction loads the weights; `allocate` lays out the KV cache."""

    def __init__(
        self,
        model_dir: Path,
        slots: dict[LayerId, tuple[int, ...]],
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        attention: bool = True,
        dense: DenseSpec = NOT_SHARED,
        kernels: str = "auto",
        alone: bool = False,
        in_graphs: bool = False,
    ) -> None:
        """`slots[layer]`: the expert in each slot of this rank; all empty if it has not the expert
        role. `attention`: whether it has that role. `dense`: dense layers that groups of ranks
        share. `alone`, `in_graphs`: `Generator`. Raises CheckpointError, NoKernels, BatchVariant.
        """
        register_hooks()
        self.kernels = choose("native" if alone else kernels, device, dtype)
        started = time.monotonic()
        shared = {i: DenseLayer(i, dense.num_shards, device) for i in dense.layers}
        loaded = load_model(
            model_dir, slots, dtype, device, attention,
            lambda model: replace_dense(model, shared), num_experts,
        )  # fmt: skip
        native = self.kernels.native
        layers = _moe_layers(loaded, num_experts, top_k, device, native, alone, dtype)
        held = ExpertSlots({layer.layer: slots.get(layer.layer, ()) for layer in layers})
        hidden_size, each = loaded.model_config.hidden_size, list(shared.values())
        self.worker = ExpertWorker(layers, held, hidden_size, model_dir, dtype, each)
        self._dense_reader = DenseReader(model_dir, dense.num_shards, dtype, device)
        self.generator: Generator | None = None
        if attention:
            self.load_shards(dense.shards)
            self.generator = Generator(
                loaded, self.worker.exchange, dtype, device, native, alone, in_graphs
            )
        self.device = device
        self._microbatches = 1
        self.load_s = time.monotonic() - started

    @property
    def exchange(self) -> ExpertExchange:
        return self.worker.exchange

    @property
    def maskable(self) -> bool:
        """Whether every router here can leave experts out."""
        return self.generator is None or self.generator.maskable

    def num_bytes(self) -> int:
        """What weights, slots and KV pages take on this rank's device."""
        attention = self.generator.num_bytes() if self.generator is not None else 0
        return attention + self.worker.num_bytes()

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Lay out the KV pages, zeroed. An expert rank has none."""
        if self.generator is not None:
            self.generator.allocate(num_blocks, block_size)

    def compile(self) -> str:
        """Compile decoder layers, after `allocate`; what came of it, for people."""
        assert self.generator is not None, "an expert rank has no layers to compile"
        return self.generator.compile()

    def run_eagerly(self) -> None:
        """Instead of `compile`."""
        assert self.generator is not None, "an expert rank has no layers to compile"
        self.generator.run_eagerly()

    @property
    def recompiled(self) -> int:
        """`Graphs.recompiled`; 0 without graphs."""
        return self._graphs.recompiled if self._graphs is not None else 0

    @property
    def in_graphs(self) -> bool:
        return self._graphs is not None

    @property
    def _graphs(self) -> Graphs | None:
        return None if self.generator is None else self.generator.graphs

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV block over all layers; 0 on an expert rank."""
        return 0 if self.generator is None else self.generator.kv_bytes_per_block(block_size)

    def load_shards(self, shards: Iterable[int]) -> int:
        """Read shards of the shared dense layers that are not held yet; returns how many.

        Raises CheckpointError.
        """
        return self._dense_reader.load(self.exchange.dense.values(), shards)

    def become_expert_rank(self, num_slots: int) -> None:
        """Give the attention role up, if it has it: its weights and KV pages are freed, and their
        memory goes back to the system. Then there are `num_slots` empty slots in every layer; none
        if there is no memory for them. Not while a step runs.
        """
        if self.generator is not None:
            self.generator.free()
        self.generator = None
        for layer in self.exchange.layers.values():
            layer.module.revive_exchange = None
        for dense in self.exchange.dense.values():
            dense.shards.clear()
        return_memory()
        self.worker.resize(num_slots)

    def enter(self, dispatchers: Sequence[Dispatcher], membership: Membership, me: RankId) -> None:
        """Take up an epoch: a dispatcher for each micro-batch, expert map, router masks."""
        self._microbatches = len(dispatchers)
        self.exchange.enter(dispatchers, membership, me)
        if self.generator is not None:
            self.generator.mask(membership)

    @torch.inference_mode()
    def serve(self) -> None:
        """A step in which this rank has no tokens: only its experts work.

        Collective over the domain. Raises NonFiniteStep behind the last layer.
        """
        self.exchange.reset()
        self.exchange.serve()
        self.exchange.on_phase("sample", -1, 0)
        self._refuse_non_finite()

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[StepResult]:
        """Run a non-empty batch; results aligned with `batch.items`. Collective over the domain.

        Raises NonFiniteStep, before anything is drawn, if NaN or infinity appeared anywhere here:
        also in what this rank's experts made of other ranks' rows.
        """
        assert self.generator is not None, "an expert rank has no tokens of its own"
        self.exchange.reset()
        rows = self.generator.rows(split(batch.items, self._microbatches))
        self.exchange.on_phase("sample", -1, len(rows))
        scores, logits = self.generator.score(batch.items, rows, self._noted)
        self._refuse_non_finite()
        return self.generator.draw(batch.items, scores, logits)

    def _noted(self, logits: torch.Tensor) -> torch.Tensor:
        logits = self.exchange.spoil("sample", -1, logits)
        self.exchange.finite.note_logits(logits)
        return logits

    def zero_written(self, batch: Batch) -> None:
        """`Generator.zero_written`."""
        if self.generator is not None:
            self.generator.zero_written(batch)

    def _refuse_non_finite(self) -> None:
        if place := self.exchange.non_finite():
            raise NonFiniteStep(place)


def _moe_layers(
    loaded: LoadedModel,
    num_experts: int,
    top_k: int,
    device: torch.device,
    native: Native | None,
    exact: bool,
    dtype: torch.dtype,
) -> list[MoeLayer]:
    layers = [
        MoeLayer(layer, module, num_experts, top_k, native, exact, dtype)
        for layer, module in loaded.experts.items()
    ]
    for layer in layers:
        layer.slot_of_expert_E = layer.slot_of_expert_E.to(device)
        layer.module.revive_layer = layer
        layer.module.revive_exchange = None
    return layers


def return_memory() -> None:
    """Give freed memory back to the system, not only to the allocator."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
