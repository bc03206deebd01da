"""Runs one rank's share of a step through the model: tokens in, drawn tokens out."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from revivemoe.comm.dispatch import Dispatcher
from revivemoe.core.step import Batch, ScheduledSequence, StepResult
from revivemoe.ids import ExpertId, LayerId, RankId, SlotId
from revivemoe.messages import SlotLoad, TokenLogprobs
from revivemoe.model import experts as experts_hook
from revivemoe.model.expert_loads import ExpertLoader, ExpertSource, LoadReport
from revivemoe.model.expert_reader import ExpertReader
from revivemoe.model.experts import ExpertExchange, MoeLayer
from revivemoe.model.finite import NonFinitePlace, NonFiniteStep
from revivemoe.model.host_cache import HostCache
from revivemoe.model.load import ATTENTION, EXPERTS, LoadedModel, load_model
from revivemoe.model.paged import PagedCache, ProbeCache, paged_attention, plan_attention
from revivemoe.model.router import MaskableRouter
from revivemoe.model.sampling import SamplingRow, sample, token_logprobs
from revivemoe.placement import EMPTY, ExpertPlacement
from revivemoe.topology import Topology


def register_hooks() -> None:
    """Make our attention and experts known to `transformers`. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
    experts_hook.register(EXPERTS)


class ModelRunner:
    """The model of one rank with its KV pages, experts and sampler.

    Built in two steps: construction loads the weights; `allocate` lays out the KV cache.
    """

    def __init__(
        self,
        model_dir: Path,
        slots: dict[LayerId, tuple[int, ...]],
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`slots[layer]`: the expert in each slot of this rank. Raises CheckpointError."""
        register_hooks()
        started = time.monotonic()
        loaded = load_model(model_dir, slots, dtype, device)
        self._model = loaded.model
        self._device, self._dtype = device, dtype
        self._routers = _wrap_routers(loaded)
        layers = [
            MoeLayer(layer, module, num_experts, top_k, slots.get(layer, ()))
            for layer, module in loaded.experts.items()
        ]
        for layer in layers:
            layer.slot_of_expert_E = layer.slot_of_expert_E.to(device)
            layer.module.revive_layer = layer
            layer.module.revive_exchange = None
        self.exchange = ExpertExchange(layers, loaded.model.config.hidden_size, dtype)
        self._loader = ExpertLoader(layers, ExpertReader(model_dir, dtype))
        self._cache: PagedCache | None = None
        self._kv_shapes = self._probe()
        self.load_s = time.monotonic() - started

    @property
    def maskable(self) -> bool:
        """Whether every MoE layer's router can leave experts out."""
        if self._routers.keys() != self.exchange.layers.keys():
            return False
        return all(router.form is not None for router in self._routers.values())

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block over all layers."""
        values = sum(h * d for pair in self._kv_shapes for h, d in pair)
        return values * block_size * self._dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Lay out the KV pages, zeroed."""
        self._cache = PagedCache(self._kv_shapes, num_blocks, block_size, self._dtype, self._device)
        self._cache.on_attention = self._reach_attention
        for module in self._attention_modules():
            module.revive_cache = self._cache

    def _reach_attention(self, layer: int, num_tokens: int) -> None:
        self.exchange.on_phase("attention", layer, num_tokens)

    # ---- experts in slots ---------------------------------------------------------------------

    def held(self) -> dict[LayerId, tuple[int, ...]]:
        """The expert in each slot, by layer; -1: none."""
        return {layer.layer: tuple(layer.held) for layer in self.exchange.layers.values()}

    def to_load(self, placement: ExpertPlacement, me: RankId) -> tuple[SlotLoad, ...]:
        """What `placement` gives this rank that its slots do not hold yet."""
        held = self.held()
        return tuple(
            SlotLoad(layer, SlotId(slot), ExpertId(expert))
            for layer, given in zip(placement.layers, placement.slots.get(me, ()), strict=False)
            for slot, expert in enumerate(given)
            if expert not in (EMPTY, held[layer][slot])
        )

    def load_experts(
        self, loads: Sequence[SlotLoad], sources: Sequence[ExpertSource] = ()
    ) -> LoadReport:
        """Load experts into slots that the present epoch does not use; from any thread.

        `sources`, in this order, are asked before host memory and the checkpoint. Raises
        CheckpointError; experts already loaded by then stay.
        """
        return self._loader.load(loads, sources)

    def find_expert(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
        """Copies of an expert's rows, if a slot here holds it: for a peer. From any thread."""
        return self._loader.find(layer, expert)

    def attach_host_cache(self, fd: int) -> None:
        """Share converted experts with the other ranks of this host (`create_host_cache`).

        Raises ValueError if the cache does not fit this model.
        """
        self._loader.host_cache = HostCache(fd, self.row_shapes())

    def row_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of one expert's share of each parameter of its module."""
        module = next(iter(self.exchange.layers.values())).module
        params = {name: getattr(module, name) for name in module.revive_rows}
        return {name: (tuple(param.shape[1:]), param.dtype) for name, param in params.items()}

    def fill_host_cache(self) -> int:
        """Put the experts this rank holds into host memory; returns how many. From any thread."""
        return self._loader.fill_host_cache()

    # ---- steps --------------------------------------------------------------------------------

    def enter(
        self, dispatcher: Dispatcher, placement: ExpertPlacement, topology: Topology, me: RankId
    ) -> None:
        """Take up an epoch: expert map, dispatcher, and router masks for missing experts."""
        self.exchange.enter(dispatcher, placement, topology, me)
        missing: dict[LayerId, list[ExpertId]] = {}
        for layer_id, expert in placement.missing():
            missing.setdefault(layer_id, []).append(expert)
        for layer_id, router in self._routers.items():
            mask = torch.zeros(placement.num_experts, dtype=torch.bool)
            mask[missing.get(layer_id, [])] = True
            router.set_missing(mask.to(self._device))

    @torch.inference_mode()
    def serve(self) -> None:
        """A step in which this rank has no tokens: only its experts work.

        Collective over the domain. Raises NonFiniteStep behind the last layer.
        """
        self.exchange.finite.reset()
        self.exchange.serve()
        self._refuse_non_finite()

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[StepResult]:
        """Run a non-empty batch; results aligned with `batch.items`. Collective over the domain.

        Raises NonFiniteStep, before anything is drawn, if NaN or infinity appeared anywhere here:
        also in what this rank's experts made of other ranks' rows.
        """
        assert self._cache is not None, "execute before allocate"
        self.exchange.finite.reset()
        self._cache.batch = plan_attention(batch.items, self._cache.block_size, self._device)
        keep = _rows_to_keep(batch.items)
        logits = self._forward(_token_ids(batch.items), self._cache.batch.positions_T, keep)
        self.exchange.on_phase("sample", -1, len(logits))
        logits = self.exchange.spoil("sample", -1, logits)
        self.exchange.finite.note_logits(logits)
        self._refuse_non_finite()
        return self._results(batch.items, logits)

    def non_finite(self) -> NonFinitePlace | None:
        """(layer, phase, produced here) of the step just run, or interrupted: where the first NaN
        or infinity appeared on this rank.
        """
        return self.exchange.finite.first()

    def _refuse_non_finite(self) -> None:
        if place := self.non_finite():
            raise NonFiniteStep(place)

    @torch.inference_mode()
    def zero_written(self, batch: Batch) -> None:
        """Zero the KV that a step over `batch` wrote, after it was undone.

        A NaN left in a block would leak through attention even where it is masked.
        """
        assert self._cache is not None, "no step was run before allocate"
        plan = plan_attention(batch.items, self._cache.block_size, self._device)
        self._cache.zero(plan.write_slots_T)

    def _forward(
        self, token_ids: Sequence[int], positions_T: torch.Tensor, keep: Sequence[int]
    ) -> torch.Tensor:
        out = self._model(
            input_ids=torch.tensor([list(token_ids)], device=self._device),
            position_ids=positions_T[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(list(keep), dtype=torch.int64, device=self._device),
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _results(
        self, items: Sequence[ScheduledSequence], logits: torch.Tensor
    ) -> list[StepResult]:
        """Cut the kept logits into each sequence's prompt rows and its one sampling row."""
        prompt_parts: list[tuple[TokenLogprobs, ...]] = []
        sample_rows: list[int] = []
        row = 0
        for item in items:
            wanted = item.num_prompt_logprobs
            prompt_parts.append(_prompt_part(item, logits[row : row + wanted]))
            row += wanted
            if item.samples:
                sample_rows.append(row)
                row += 1
        drawn = iter(
            sample(logits[sample_rows], [_sampling_row(item) for item in items if item.samples])
        )
        results = []
        for item, part in zip(items, prompt_parts, strict=True):
            if item.samples:
                token = next(drawn)
                results.append(StepResult(token.token_id, token.logprobs, part))
            else:
                results.append(StepResult(None, None, part))
        return results

    @torch.inference_mode()
    def _probe(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Run one token with stand-ins for cache and experts, to learn the KV shapes."""
        probe = ProbeCache()
        for module in self._attention_modules():
            module.revive_cache = probe
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        self._model(input_ids=zero, position_ids=zero, past_key_values=probe, use_cache=True)
        for layer in self.exchange.layers.values():
            layer.module.revive_exchange = self.exchange
        return [probe.shapes[i] for i in sorted(probe.shapes)]

    def _attention_modules(self) -> list[Any]:
        return [
            m
            for m in self._model.modules()
            if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")
        ]


def _wrap_routers(loaded: LoadedModel) -> dict[LayerId, MaskableRouter]:
    routers = {}
    for layer, (parent, name) in loaded.routers.items():
        if name:
            routers[layer] = MaskableRouter(getattr(parent, name))
            setattr(parent, name, routers[layer])
    return routers


def _token_ids(items: Sequence[ScheduledSequence]) -> list[int]:
    ids: list[int] = []
    for item in items:
        ids.extend(item.sequence.history[item.start : item.start + item.count])
    return ids


def _prompt_part(item: ScheduledSequence, logits: torch.Tensor) -> tuple[TokenLogprobs, ...]:
    if not len(logits):
        return ()
    begin = item.start + 1
    targets = item.sequence.prompt_ids[begin : begin + len(logits)]
    top = item.sequence.params.prompt_logprobs or 0
    return tuple(token_logprobs(logits, targets, [top] * len(targets)))


def _rows_to_keep(items: Sequence[ScheduledSequence]) -> list[int]:
    """Flat rows whose logits are needed: prompt rows first, then the sampling row, per item."""
    keep: list[int] = []
    row = 0
    for item in items:
        keep.extend(range(row, row + item.num_prompt_logprobs))
        if item.samples:
            keep.append(row + item.count - 1)
        row += item.count
    return keep


def _sampling_row(item: ScheduledSequence) -> SamplingRow:
    sequence = item.sequence
    return SamplingRow(sequence.params, sequence.prompt_ids, sequence.output_ids)
