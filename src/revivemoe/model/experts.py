"""This rank's experts, and the hook that sends every token to where its experts are.

Legend: T tokens here, K experts per token, E experts of the layer, S slots on a rank, R rows
received from all members, H hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revivemoe.comm.dispatch import Dispatcher
from revivemoe.core.effects import Place
from revivemoe.host.huge_pages import ask_for_huge_pages
from revivemoe.ids import LayerId, RankId, SlotId
from revivemoe.kernels.native import Native
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Holder
from revivemoe.model.dense import DenseLayer
from revivemoe.model.expert_function import experts_of
from revivemoe.model.finite import FiniteCheck

PhaseHook = Callable[[str, int, int], None]
"""Called with (phase, layer, rows it will work on) as a step reaches each phase: progress, what is
to be expected of the phase, and where faults strike."""
SpoilHook = Callable[[str, int, Tensor], Tensor]
"""Given (phase, layer, what the phase produced), returns that, or what an injected fault makes of
it. Phases as in `Place`."""


class MoeLayer:
    """One layer's local experts and the map from experts to slots of the whole domain."""

    def __init__(
        self,
        layer: LayerId,
        module: nn.Module,
        num_experts: int,
        top_k: int,
        native: Native | None = None,
        exact: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`module` holds slots (`load_model`). `dtype`: of the hidden states that come."""
        self.layer, self.dtype = layer, dtype
        self.module = module
        self.top_k = top_k
        self.num_experts = num_experts
        self.slot_of_expert_E = torch.full((num_experts,), -1, dtype=torch.int64)
        self._experts = experts_of(module, dtype, native, exact)

    def compute(self, rows_RH: Tensor, slot_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Weighted sum of this rank's experts for each row, [R, H] float32 (`exact`: float64).

        Slot id S is the sentinel for "not on this rank".
        """
        return self._experts(rows_RH, slot_ids_RK, weights_RK)

    def resize(self, num_slots: int) -> None:
        """So many slots. Not while a step runs.

        What lies in them is never read before an expert is written: not even zeros are needed.
        """
        device = self.slot_of_expert_E.device
        for name in self.module.revive_rows:
            old = getattr(self.module, name)
            rows = torch.empty(num_slots, *old.shape[1:], dtype=old.dtype, device=device)
            if device.type == "cpu":
                ask_for_huge_pages(rows.data_ptr(), rows.nbytes)
            setattr(self.module, name, nn.Parameter(rows, requires_grad=False))
        self.module.num_experts = num_slots

    def read_slot(self, slot: SlotId) -> dict[str, Tensor]:
        """The slot's row of each parameter of the experts module: views of the live buffers."""
        return {name: getattr(self.module, name).data[slot] for name in self.module.revive_rows}


class Lane:
    """The traffic of one micro-batch, and the check of its numbers."""

    def __init__(self, finite: FiniteCheck) -> None:
        self.finite = finite
        self.dispatcher: Dispatcher | None = None
        """To the experts, of the present epoch."""
        self.dense: Dispatcher | None = None
        """To the shards of dense layers, where there are any."""


class ExpertExchange:
    """Runs the experts of a step over the domain: dispatch, compute what arrived, combine.

    One per process. `enter` binds it to an epoch's expert map, and to one dispatcher for each
    micro-batch of a step. All members take the micro-batches of a layer in the same order.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        hidden_size: int,
        dtype: torch.dtype,
        dense: Sequence[DenseLayer] = (),
    ) -> None:
        """`dense`: layers whose feed-forward part is shared by groups of ranks."""
        self.layers = {layer.layer: layer for layer in layers}
        self.dense = {layer.layer: layer for layer in dense}
        self._hidden_size = hidden_size
        self._dtype = dtype
        self.lanes = [self._new_lane()]
        self._lane = self.lanes[0]
        self.on_phase: PhaseHook = lambda phase, layer, num_rows: None
        self.spoil: SpoilHook = lambda phase, layer, values: values
        self.on_sent: Callable[[], None] = lambda: None
        """Called when tokens are on their way: something else can be done before they are back."""

    @property
    def finite(self) -> FiniteCheck:
        """Of the present micro-batch."""
        return self._lane.finite

    def enter(self, dispatchers: Sequence[Dispatcher], membership: Membership, me: RankId) -> None:
        """Take up an epoch: its dispatchers, and for each expert the slot this rank will use."""
        chosen = choose_slots(membership, me)
        for layer in self.layers.values():
            table = chosen[layer.layer]
            layer.slot_of_expert_E = torch.tensor(table, device=layer.slot_of_expert_E.device)
        while len(self.lanes) < len(dispatchers):
            self.lanes.append(self._new_lane())
        for lane, dispatcher in zip(self.lanes, dispatchers, strict=True):
            lane.dispatcher = dispatcher

    def enter_dense(
        self, dispatchers: Sequence[Dispatcher], membership: Membership, me: RankId
    ) -> None:
        """After `enter`, the same for the dense layers that are shared."""
        for layer in self.dense.values():
            layer.enter(membership, me)
        for lane, dispatcher in zip(self.lanes, dispatchers, strict=True):
            lane.dense = dispatcher

    def leave(self) -> None:
        for lane in self.lanes:
            lane.dispatcher = lane.dense = None

    def turn_to(self, microbatch: int) -> None:
        """What comes next belongs to this micro-batch."""
        self._lane = self.lanes[microbatch]

    def reset(self) -> None:
        """A new step begins."""
        self.turn_to(0)
        for lane in self.lanes:
            lane.finite.reset()

    def non_finite(self) -> Place | None:
        """The first place of the step where NaN or infinity appeared, of any micro-batch; one where
        it was produced before others.
        """
        places = [place for lane in self.lanes if (place := lane.finite.first())]
        return min(places, key=lambda p: (not p.produced_here, p.layer < 0, p.layer), default=None)

    def run(
        self,
        layer: MoeLayer,
        hidden_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """The experts' [T, H] output for this rank's tokens; collective over the domain."""
        slot_ids_TK = layer.slot_of_expert_E.take(experts_TK)
        return self._run(self._lane.dispatcher, layer, hidden_TH, slot_ids_TK, weights_TK)

    def run_dense(
        self,
        layer: DenseLayer,
        hidden_TH: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """The same for a dense layer, whose shards stand for experts that every token chooses."""
        return self._run(self._lane.dense, layer, hidden_TH, slot_ids_TK, weights_TK)

    def _run(
        self,
        dispatcher: Dispatcher | None,
        layer: MoeLayer | DenseLayer,
        hidden_TH: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        assert dispatcher is not None, "experts are called outside an epoch"
        note, at = self._lane.finite.note, layer.layer
        hidden_TH = self.spoil("attention", at, hidden_TH)
        note(at, "attention", hidden_TH)
        note(at, "router", weights_TK)
        self.on_phase("dispatch", at, len(hidden_TH))
        sent = dispatcher.send(hidden_TH, slot_ids_TK, weights_TK)
        self.on_sent()
        arrived = dispatcher.receive(sent)
        self.on_phase("experts", at, len(arrived.rows_RH))
        note(at, "rows", arrived.rows_RH)
        note(at, "weights", arrived.weights_RK)
        out_RH = layer.compute(arrived.rows_RH, arrived.slot_ids_RK, arrived.weights_RK)
        out_RH = self.spoil("experts", at, out_RH)
        note(at, "experts", out_RH)
        self.on_phase("combine", at, len(out_RH))
        combined_TH = dispatcher.combine(out_RH, arrived.handle)
        combined_TH = self.spoil("combine", at, combined_TH)
        note(at, "combine", combined_TH)
        return combined_TH

    def serve(self) -> None:
        """A step without tokens of our own: serve the other members' rows, layer after layer."""
        for layer in self._all_layers():
            for microbatch in range(len(self.lanes)):
                self.turn_to(microbatch)
                self._serve_layer(layer)

    def serve_microbatch(self) -> None:
        """The same for the present micro-batch alone, while others of the step have tokens."""
        for layer in self._all_layers():
            self._serve_layer(layer)

    def _all_layers(self) -> list[MoeLayer | DenseLayer]:
        """In the order in which the model comes to them."""
        layers: list[MoeLayer | DenseLayer] = [*self.layers.values(), *self.dense.values()]
        return sorted(layers, key=lambda layer: layer.layer)

    def _serve_layer(self, layer: MoeLayer | DenseLayer) -> None:
        """The phases are reached here as they are where there are tokens."""
        self.on_phase("attention", layer.layer, 0)
        hidden = torch.zeros(0, self._hidden_size, dtype=self._dtype, device=self._device)
        none = torch.zeros(0, layer.top_k, dtype=torch.int64, device=self._device)
        to = self._lane.dispatcher if isinstance(layer, MoeLayer) else self._lane.dense
        self._run(to, layer, hidden, none, none.float())

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).slot_of_expert_E.device

    def _new_lane(self) -> Lane:
        """Hidden states are of the model's dtype, weights that or float32, sums over experts
        float32 or, where they are exact, float64.
        """
        layers = [layer.layer for layer in self._all_layers()]
        return Lane(FiniteCheck(layers, (self._dtype, torch.float32, torch.float64), self._device))


def choose_slots(membership: Membership, me: RankId) -> dict[LayerId, list[int]]:
    """For each expert of each layer, [E], the physical slot (logical rank * S + slot) `me` sends
    to, or -1.

    A replica on this rank is preferred; otherwise sources spread over the replicas.
    """
    placement, topology = membership.placement, membership.topology
    width = placement.slots_per_rank
    base = {rank: topology.logical_rank(rank) * width for rank in membership.experts}
    order = {rank: place for place, rank in enumerate(membership.experts)}

    def choose(expert: int, held: list[Holder]) -> int:
        if not held:
            return -1
        for rank, slot in held:
            if rank == me:
                return base[rank] + slot
        if len(held) > 1:
            held = sorted(held, key=lambda holder: order[holder[0]])
        rank, slot = held[(me + expert) % len(held)]
        return base[rank] + slot

    return {
        layer: [choose(expert, held) for expert, held in enumerate(of_layer)]
        for layer, of_layer in zip(placement.layers, placement.holders_LE, strict=True)
    }


def dispatched_experts(
    module: nn.Module,
    hidden_TH: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Registered with `ALL_EXPERTS_FUNCTIONS`: the experts modules' forward."""
    exchange = module.revive_exchange
    if exchange is None:  # shape probe at start-up
        if hidden_TH.dtype != module.revive_layer.dtype:
            raise NotImplementedError(f"experts of {hidden_TH.dtype} hidden states")
        return torch.zeros_like(hidden_TH)
    if getattr(module, "revive_in_graph", False):
        number = module.revive_number
        in_graph: Tensor = torch.ops.revivemoe.experts(
            hidden_TH, top_k_index, top_k_weights, number
        )
        return in_graph
    out: Tensor = exchange.run(module.revive_layer, hidden_TH, top_k_index, top_k_weights)
    return out
