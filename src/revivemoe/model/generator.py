"""The attention side of a rank: everything of the model but the experts, the KV cache, the sampler.

Tokens in, drawn tokens out. A step's batch may be cut into micro-batches, which take turns at the
place where the model calls its experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from revivemoe.core.step import Batch, ScheduledSequence, StepResult
from revivemoe.host.cuda_thread import use_device
from revivemoe.ids import ExpertId, LayerId
from revivemoe.kernels.native import Native
from revivemoe.membership.membership import Membership
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.model.batch_invariant import RowsAlone
from revivemoe.model.dense import ShardedMlp
from revivemoe.model.experts import ExpertExchange
from revivemoe.model.fused_attention import fuse_attention
from revivemoe.model.graphs import CannotCompile, Graphs
from revivemoe.model.head import Head, KeptRow, in_slices, kept_rows
from revivemoe.model.load import LoadedModel
from revivemoe.model.native_modules import use_native
from revivemoe.model.paged import AttentionBatch, PagedCache, plan_attention
from revivemoe.model.probe import Attends, probe
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
        native: Native | None = None,
        alone: bool = False,
        in_graphs: bool = False,
    ) -> None:
        """`native`: our own kernels, where they are. `alone`: no row's bits may depend on the rows
        beside it. `in_graphs`: `compile` follows. Raises CheckpointError, BatchVariant.
        """
        assert not (alone and in_graphs), "a compiler decides how it adds up"
        assert not alone or native is not None, "only our own kernels compute a row alone"
        assert loaded.model is not None, "only experts are loaded"
        self.model = loaded.model
        self._exchange = exchange
        self._device, self._dtype, self._native = device, dtype, native
        self.routers = _wrap_routers(loaded)
        self._head = Head(self.model)
        self._cache: PagedCache | None = None
        self._turns = Turns(self._turn_to)
        self._plans: list[AttentionBatch | None] = []
        """Of the micro-batches of the present step; None where there are no tokens."""
        self._alone = alone
        self._arithmetic: AbstractContextManager[object] = nullcontext()
        self._in_graphs = in_graphs
        self.graphs: Graphs | None = None
        rows_of = self._use_kernels() if not in_graphs else {}
        learned = self._probe()
        self._kv_shapes = [one.shape for one in learned]
        self._learned = learned
        if not in_graphs:
            self._fuse(rows_of)

    def _use_kernels(self) -> dict[tuple[int, ...], int]:
        """Of our own, where they are; returns up to how many rows, by shape of a weight."""
        native = self._native
        if native is None:
            return {}
        rows_of = use_native(self.model, native, self._alone)
        for router in self.routers.values():
            router.use(native)
        if self._alone:
            self._arithmetic = RowsAlone(native)
        return rows_of

    def _fuse(self, rows_of: Mapping[tuple[int, ...], int]) -> None:
        if self._native is not None:
            modules = self._attention_modules()
            fuse_attention(modules, self._learned, self._dtype, self._native, rows_of)

    def run_eagerly(self) -> None:
        """There will be no graphs: as if none had been asked for."""
        for router in self.routers.values():
            router.go_by_mask(False)
        self._fuse(self._use_kernels())
        if self._cache is not None:
            for module in self._attention_modules():
                module.revive_cache = self._cache

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
        self._cache = PagedCache(
            self._kv_shapes,
            num_blocks,
            block_size,
            self._dtype,
            self._device,
            self._native,
            self._alone,
        )
        self._cache.on_attention = lambda layer, num: self._exchange.on_phase(
            "attention", layer, num
        )
        for module in self._attention_modules():
            module.revive_cache = self._cache

    def compile(self) -> str:
        """Compile the decoder layers; they run as they are if that cannot be. After `allocate`, and
        with `in_graphs`. What came of it, for people.
        """
        cache = self._cache
        assert cache is not None, "compiled before allocate"
        assert self._in_graphs, "loaded for something else"
        for router in self.routers.values():
            router.go_by_mask(True)
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]

        def run(rows: int) -> None:
            numbers = torch.arange(rows, device=self._device)[None]
            self.model(
                input_ids=numbers, position_ids=numbers, past_key_values=cache, use_cache=True
            )

        graphs = Graphs(layers, self._attention_modules(), cache, self._exchange, self._native)
        try:
            with torch.inference_mode():
                graphs.compile(run)
        except CannotCompile as error:
            self.run_eagerly()
            return f"none: {error}"
        self.graphs = self._arithmetic = graphs
        return f"{graphs.compiled} in {graphs.compile_s:.1f} s"

    @torch.inference_mode()
    def zero_written(self, batch: Batch) -> None:
        """Zero the KV that a step over `batch` wrote, after it was undone.

        A NaN left in a block would leak through attention even where it is masked.
        """
        assert self._cache is not None, "no step was run before allocate"
        plan = plan_attention(batch.items, self._cache.block_size, self._device)
        self._cache.zero(plan.write_slots_T)

    @torch.inference_mode()
    def rows(self, microbatches: Sequence[tuple[ScheduledSequence, ...]]) -> torch.Tensor:
        """Rows that the sequences of a step need, in the order of the sequences: their logits,
        [rows, vocabulary], or hidden states if those are made in slices. Collective over the
        domain: as many micro-batches on all members.
        """
        cache = self._cache
        assert cache is not None, "a step before allocate"
        kept = kept_rows([item for items in microbatches for item in items])
        self._head.wanted = len(in_slices(kept, self._head.most)) > 1
        self._plans = [
            plan_attention(items, cache.block_size, self._device, self._alone) if items else None
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
            use_device(str(self._device))
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
        kept = [row.row for row in kept_rows(items)]
        keep = torch.tensor(kept, dtype=torch.int64, device=self._device)
        with self._arithmetic:
            out = self.model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=self._cache.batch.positions_T[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep[:0] if self._head.wanted else keep,
            )
        rows: torch.Tensor = self._head.hidden()[keep] if self._head.wanted else out.logits[0]
        return rows

    @torch.inference_mode()
    def score(
        self,
        items: Sequence[ScheduledSequence],
        rows: torch.Tensor,
        noted: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[list[tuple[TokenLogprobs, ...]], torch.Tensor]:
        """Log-probabilities of each sequence's prompt tokens, and the logits to draw from.

        `rows`: as they come from `rows`. `noted`: is given all logits, a slice at a time.
        """
        kept, drawn = kept_rows(items), list[torch.Tensor]()
        scores: list[list[TokenLogprobs]] = [[] for _ in items]
        for piece in in_slices(kept, self._head.most):
            logits = noted(self._head.logits(rows[piece]) if self._head.wanted else rows)
            of_piece = [kept[i] for i in piece]
            draws = [i for i, row in enumerate(of_piece) if row.target is None]
            drawn.append(logits[draws])
            for item, begin, targets in _prompts(of_piece):
                top = items[item].sequence.params.prompt_logprobs or 0
                part = logits[begin : begin + len(targets)]
                scores[item] += token_logprobs(part, targets, [top] * len(targets))
        return [tuple(of_item) for of_item in scores], torch.cat(drawn)

    @torch.inference_mode()
    def draw(
        self,
        items: Sequence[ScheduledSequence],
        scores: Sequence[tuple[TokenLogprobs, ...]],
        logits: torch.Tensor,
    ) -> list[StepResult]:
        """A token for each sequence that takes one: from its row of the logits."""
        sampled = [item.sequence for item in items if item.samples]
        rows = [SamplingRow(s.params, s.prompt_ids, s.output_ids) for s in sampled]
        drawn = iter(sample(logits, rows))
        results = []
        for item, part in zip(items, scores, strict=True):
            if item.samples:
                token = next(drawn)
                results.append(StepResult(token.token_id, token.logprobs, part))
            else:
                results.append(StepResult(None, None, part))
        return results

    def _probe(self) -> list[Attends]:
        """Learn how layers attend; from now on the experts are called for real."""
        with self._arithmetic:
            learned = probe(
                self.model, self._attention_modules(), self._device, self._dtype, self._alone
            )
        for layer in self._exchange.layers.values():
            layer.module.revive_exchange = self._exchange
        for module in self.model.modules():
            if isinstance(module, ShardedMlp):
                module.run = self._exchange.run_dense
        return learned

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


def _prompts(rows: Sequence[KeptRow]) -> Iterator[tuple[int, int, list[int]]]:
    """Rows of one sequence's prompt behind each other: its index, the first of them, targets."""
    begin = 0
    for (item, scored), group in groupby(rows, key=lambda row: (row.item, row.target is not None)):
        targets = [row.target for row in group]
        if scored:
            yield item, begin, [target for target in targets if target is not None]
        begin += len(targets)
