"""The attention side of a rank: everything of the model but the experts, the KV cache, the sampler.

Tokens in, drawn tokens out. A step's batch may be cut into micro-batches, which take turns at the
place where the model calls its experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from revivemoe.core.step import Batch, ScheduledSequence, StepResult
from revivemoe.ids import ExpertId, LayerId
from revivemoe.membership.membership import Membership
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.model.dense import ShardedMlp
from revivemoe.model.experts import ExpertExchange
from revivemoe.model.load import LoadedModel
from revivemoe.model.paged import AttentionBatch, PagedCache, ProbeCache, plan_attention
from revivemoe.model.router import MaskableRouter
from revivemoe.model.sampling import SamplingRow, sample, token_logprobs
from revivemoe.model.turns import Turns


class Generator:
    """The model of one attention rank with its KV pages and sampler.

    Built in two steps: construction probes the loaded model; `allocate` lays out the KV cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        exchange: ExpertExchange,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert loaded.model is not None, "only experts are loaded"
        self.model = loaded.model
        self._exchange = exchange
        self._device, self._dtype = device, dtype
        self.routers = _wrap_routers(loaded)
        self._cache: PagedCache | None = None
        self._turns = Turns(self._turn_to)
        self._plans: list[AttentionBatch | None] = []
        """Of the micro-batches of the present step; None where there are no tokens."""
        self._kv_shapes = self._probe()

    @property
    def maskable(self) -> bool:
        """Whether every MoE layer's router can leave experts out."""
        if self.routers.keys() != self._exchange.layers.keys():
            return False
        return all(router.form is not None for router in self.routers.values())

    def mask(self, membership: Membership) -> None:
        """Leave out of the routers what no rank holds."""
        missing: dict[LayerId, list[ExpertId]] = {}
        for layer_id, expert in membership.missing:
            missing.setdefault(layer_id, []).append(expert)
        for layer_id, router in self.routers.items():
            mask = torch.zeros(membership.placement.num_experts, dtype=torch.bool)
            mask[missing.get(layer_id, [])] = True
            router.set_missing(mask.to(self._device))

    def free(self) -> None:
        """Let go of weights and pages at once, without waiting for the garbage collector. Nothing
        works any more. The experts' slots are not ours.
        """
        experts = {layer.module for layer in self._exchange.layers.values()}
        for module in self.model.modules():
            if module not in experts:
                for parameter in module.parameters(recurse=False):
                    parameter.data = torch.empty(0, dtype=parameter.dtype)
        if self._cache is not None:
            self._cache.pages.clear()

    def num_bytes(self) -> int:
        """What its weights and its KV pages take, without the experts' slots."""
        experts = {
            id(parameter)
            for layer in self._exchange.layers.values()
            for parameter in layer.module.parameters(recurse=False)
        }
        weights = sum(p.nbytes for p in self.model.parameters() if id(p) not in experts)
        shards = [s for layer in self._exchange.dense.values() for s in layer.shards.values()]
        weights += sum(tensor.nbytes for shard in shards for tensor in shard.values())
        pages = self._cache.pages if self._cache is not None else []
        return weights + sum(page.nbytes for pair in pages for page in pair)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block over all layers."""
        values = sum(h * d for pair in self._kv_shapes for h, d in pair)
        return values * block_size * self._dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Lay out the KV pages, zeroed."""
        self._cache = PagedCache(self._kv_shapes, num_blocks, block_size, self._dtype, self._device)
        self._cache.on_attention = lambda layer, num: self._exchange.on_phase(
            "attention", layer, num
        )
        for module in self._attention_modules():
            module.revive_cache = self._cache

    @torch.inference_mode()
    def zero_written(self, batch: Batch) -> None:
        """Zero the KV that a step over `batch` wrote, after it was undone.

        A NaN left in a block would leak through attention even where it is masked.
        """
        assert self._cache is not None, "no step was run before allocate"
        plan = plan_attention(batch.items, self._cache.block_size, self._device)
        self._cache.zero(plan.write_slots_T)

    @torch.inference_mode()
    def logits(self, microbatches: Sequence[tuple[ScheduledSequence, ...]]) -> torch.Tensor:
        """Rows that the sequences of a step need, [rows, vocabulary], in the order of the
        sequences. Collective over the domain: as many micro-batches on all members.
        """
        cache = self._cache
        assert cache is not None, "a step before allocate"
        self._plans = [
            plan_attention(items, cache.block_size, self._device) if items else None
            for items in microbatches
        ]
        if len(microbatches) == 1:
            self._turn_to(0)
            return self._microbatch(microbatches[0])
        before, self._exchange.on_sent = self._exchange.on_sent, self._turns.give_up_turn
        try:
            tasks = [self._task(items) for items in microbatches]
            return torch.cat(self._turns.run(tasks))
        finally:
            self._exchange.on_sent = before

    def _task(self, items: tuple[ScheduledSequence, ...]) -> Callable[[], torch.Tensor | None]:
        @torch.inference_mode()
        def task() -> torch.Tensor | None:
            if items:
                return self._microbatch(items)
            self._exchange.serve_microbatch()
            return None

        return task

    def _turn_to(self, microbatch: int) -> None:
        assert self._cache is not None
        self._exchange.turn_to(microbatch)
        self._cache.batch = self._plans[microbatch]

    def _microbatch(self, items: Sequence[ScheduledSequence]) -> torch.Tensor:
        assert self._cache is not None
        assert self._cache.batch is not None
        ids = [t for i in items for t in i.sequence.history[i.start : i.start + i.count]]
        keep = torch.tensor(_rows_to_keep(items), dtype=torch.int64, device=self._device)
        out = self.model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=self._cache.batch.positions_T[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    @torch.inference_mode()
    def draw(self, items: Sequence[ScheduledSequence], logits: torch.Tensor) -> list[StepResult]:
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
        sampled = [item.sequence for item in items if item.samples]
        rows = [SamplingRow(s.params, s.prompt_ids, s.output_ids) for s in sampled]
        drawn = iter(sample(logits[sample_rows], rows))
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
        self.model(input_ids=zero, position_ids=zero, past_key_values=probe, use_cache=True)
        for layer in self._exchange.layers.values():
            layer.module.revive_exchange = self._exchange
        for module in self.model.modules():
            if isinstance(module, ShardedMlp):
                module.run = self._exchange.run_dense
        return [probe.shapes[i] for i in sorted(probe.shapes)]

    def _attention_modules(self) -> list[nn.Module]:
        return [
            m
            for m in self.model.modules()
            if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")
        ]


def _wrap_routers(loaded: LoadedModel) -> dict[LayerId, MaskableRouter]:
    routers = {}
    for layer, (parent, name) in loaded.routers.items():
        if name:
            routers[layer] = MaskableRouter(getattr(parent, name))
            setattr(parent, name, routers[layer])
    return routers


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
