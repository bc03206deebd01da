"""Dense feed-forward layers in shards: this rank's, and the module that sends tokens to a group.

    y = sum over shards s of  down_s(act(gate_s(x)) * up_s(x))

A shard is a share of the inner width: rows of gate and up, columns of down. Legend: T tokens, S
shards of a layer, G healthy groups, R rows received, H hidden size.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from revivemoe.checkpoint.files import TensorInfo
from revivemoe.ids import LayerId, RankId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.membership import Membership
from revivemoe.membership.topology import Topology
from revivemoe.model.load import CheckpointError, checkpoint_tensors
from revivemoe.model.tensor_files import TensorFiles

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Weights = dict[str, Tensor]


class DenseLayer:
    """One dense layer as this rank sees it: the shards it holds, and where the others are."""

    def __init__(self, layer: LayerId, num_shards: int, device: torch.device) -> None:
        self.layer, self.top_k = layer, num_shards
        self.act: Callable[[Tensor], Tensor] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole projections in the model; none where there is no model."""
        self.shards: dict[int, Weights] = {}
        self._device = device
        self._slots_GS = torch.zeros(0, num_shards, dtype=torch.int64, device=device)
        self._first = 0

    def enter(self, membership: Membership, me: RankId) -> None:
        """Take up an epoch. A slot on the wire is logical rank * S + shard."""
        groups, topology = membership.dense, membership.topology
        assert groups is not None, "no dense layers are shared"
        slots = [
            [topology.logical_rank(rank) * groups.size + shard for shard, rank in enumerate(group)]
            for group in groups.healthy(topology.attention)
        ]
        self._slots_GS = torch.tensor(slots, dtype=torch.int64, device=self._device)
        self._first = topology.logical_rank(me)

    def slots_of(self, num_tokens: int) -> Tensor:
        """For each token the slots of its group, [T, S]: round the groups, so that they share the
        work; ranks begin at different ones.
        """
        at = torch.arange(self._first, self._first + num_tokens, device=self._device)
        return self._slots_GS[at % len(self._slots_GS)]

    def compute(self, rows_RH: Tensor, slot_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Sum of this rank's shards for each row, [R, H] float32."""
        out_RH = torch.zeros(rows_RH.shape, dtype=torch.float32, device=rows_RH.device)
        for shard, weights in sorted(self.shards.items()):
            (rows,) = (slot_ids_RK == shard).any(1).nonzero(as_tuple=True)
            if len(rows):
                out_RH.index_add_(0, rows, self._shard(rows_RH[rows], weights).float())
        return out_RH

    def _shard(self, rows: Tensor, weights: Weights) -> Tensor:
        assert self.act is not None, "a rank without the attention role computes no dense layer"
        gate, up, down = (weights[name] for name in PROJECTIONS)
        linear = torch.nn.functional.linear
        return linear(self.act(linear(rows, gate)) * linear(rows, up), down)


RunDense = Callable[[DenseLayer, Tensor, Tensor, Tensor], Tensor]
"""`ExpertExchange.run_dense`."""


class ShardedMlp(nn.Module):
    """Stands in the model for a dense feed-forward module."""

    def __init__(self, layer: DenseLayer, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._layer = layer
        layer.act = act
        self.run: RunDense | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.run is None:  # shape probe at start-up
            return torch.zeros_like(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        slots = self._layer.slots_of(len(flat))
        ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
        return self.run(self._layer, flat, slots, ones).view(hidden.shape)


def replace_dense(model: nn.Module, layers: Mapping[LayerId, DenseLayer]) -> None:
    """Put `ShardedMlp` in the place of these decoder layers' feed-forward modules, before the
    checkpoint is read: so their weights never are, as a whole.

    Raises CheckpointError for a module that is not gate, up and down without biases, and for a
    layer that the model has not got, or twice.
    """
    replaced: list[LayerId] = []
    for name, parent in list(model.named_modules()):
        _, _, number = name.rpartition("layers.")
        mlp = getattr(parent, "mlp", None)
        if not number.isdigit() or LayerId(int(number)) not in layers or mlp is None:
            continue
        names = {n for n, _ in mlp.named_parameters()}
        if names != {f"{p}.weight" for p in PROJECTIONS}:
            raise CheckpointError(
                f"--dense-ffn-tp: layer {number} of {type(model).__name__} is no plain gated "
                "feed-forward layer, and cannot be cut into shards: leave it at 1"
            )
        layer = layers[LayerId(int(number))]
        layer.shapes = {p: tuple(getattr(mlp, p).weight.shape) for p in PROJECTIONS}
        parent.mlp = ShardedMlp(layer, mlp.act_fn)
        replaced.append(layer.layer)
    if sorted(replaced) != sorted(layers):
        raise CheckpointError(
            f"--dense-ffn-tp: {type(model).__name__} has dense feed-forward parts in layers "
            f"{sorted(replaced)}, and the checkpoint in layers {sorted(layers)}: leave it at 1"
        )


@dataclass
class DenseReader:
    """Reads shards of dense layers, and nothing else, from the checkpoint."""

    _model_dir: Path
    _num_shards: int
    _dtype: torch.dtype
    _device: torch.device

    def load(self, layers: Iterable[DenseLayer], shards: Iterable[int]) -> int:
        """Add shards not held yet, all or none; returns how many. Raises CheckpointError."""
        wanted = [(layer, s) for layer in layers for s in sorted(shards) if s not in layer.shards]
        files = checkpoint_tensors(self._model_dir) if wanted else {}
        read = [self._read(files, layer, shard) for layer, shard in wanted]
        for (layer, shard), weights in zip(wanted, read, strict=True):
            layer.shards[shard] = weights
        return len(wanted)

    def _read(self, files: Mapping[str, TensorInfo], layer: DenseLayer, shard: int) -> Weights:
        weights = {}
        for name in PROJECTIONS:
            key = f"model.layers.{layer.layer}.mlp.{name}.weight"
            if key not in files:
                raise CheckpointError(f"{self._model_dir} lacks {key}, which --dense-ffn-tp needs")
            found, meant = files[key].shape, layer.shapes.get(name)
            if meant is not None and found != meant:
                raise CheckpointError(
                    f"{self._model_dir}: {key} has shape {list(found)} instead of {list(meant)} "
                    "(an incomplete or mismatched checkpoint?)"
                )
            with ExitStack() as stack:
                source = TensorFiles(stack).slice(key, files[key])
                axis = 1 if name == "down_proj" else 0
                share = source.get_shape()[axis] // self._num_shards
                span = slice(shard * share, (shard + 1) * share)
                rows = source[:, span] if axis else source[span]
            share_of = torch.empty(rows.shape, dtype=self._dtype, device=self._device)
            weights[name] = share_of.copy_(rows)  # lets go of the file
        return weights


def dense_servers(groups: DenseGroups, topology: Topology) -> tuple[int, ...]:
    """Logical ranks that hold a shard of a healthy group."""
    ranks = {rank for group in groups.healthy(topology.attention) for rank in group}
    return tuple(sorted(topology.logical_rank(rank) for rank in ranks))
