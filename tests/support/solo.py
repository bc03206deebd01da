"""One rank in this process: the real model runner and state machine, without transport or HTTP."""

import random
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.transport import SoloTransport
from revivemoe.comm.wait import Waiter
from revivemoe.core.limits import RankLimits
from revivemoe.core.rank import Rank
from revivemoe.core.step import Run, StepHeader
from revivemoe.ids import Epoch, Incarnation, LayerId, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, ExpertPlacement
from revivemoe.membership.topology import collocated
from revivemoe.messages.tokens import CommittedToken, SequenceSpec
from revivemoe.model.runner import ModelRunner
from revivemoe.sampling_params import SamplingParams

EPOCH, ME = Epoch(1), RankId(0)


class SoloRank:
    """Runs sequences to their ends. `masked`: experts that the placement lacks, by layer."""

    def __init__(
        self,
        model_dir: Path,
        limits: RankLimits,
        masked: Mapping[int, Set[int]] | None = None,
        dtype: torch.dtype = torch.float32,
        alone: bool = False,
        in_graphs: bool = False,
    ) -> None:
        info = inspect_checkpoint(model_dir)
        layers = [LayerId(layer) for layer in info.moe_layers]
        slots = {layer: _slots(info.num_experts, (masked or {}).get(layer, ())) for layer in layers}
        placement = ExpertPlacement(info.num_experts, tuple(layers), {ME: tuple(slots.values())})
        device = torch.device("cpu")
        self.runner = ModelRunner(
            model_dir, slots, info.num_experts, info.top_k, dtype, device, alone=alone,
            in_graphs=in_graphs,
        )  # fmt: skip
        self.runner.allocate(limits.num_blocks, limits.block_size)
        self.graphs = self.runner.compile() if in_graphs else ""
        transport = SoloTransport(Waiter(FenceFlag(), EPOCH, 10.0), EPOCH, (ME,), ME, device)
        rows = self.runner.kernels.rows
        dispatcher = Dispatcher(transport, placement.slots_per_rank, rows=rows)
        self.runner.enter([dispatcher], Membership(collocated(EPOCH, 1), placement), ME)
        self.rank = Rank(ME, Incarnation(1), limits)
        self.rank.configure(EPOCH, 0, b"", 0)
        self._wake = 0
        self.num_mixed_steps = 0
        """Steps in which one sequence decoded and another was in its prefill."""
        self.committed: list[CommittedToken] = []
        """Everything since this was last emptied."""

    def run(
        self, prompts: Sequence[list[int]], params: SamplingParams, steps_apart: int = 0
    ) -> list[list[int]]:
        """Output tokens of each prompt; prompt i arrives before step i * steps_apart."""
        outputs: dict[SeqId, list[int]] = {SeqId(i): [] for i in range(len(prompts))}
        waiting = [
            SequenceSpec(SeqId(i), list(prompt), [], params, arrival=i)
            for i, prompt in enumerate(prompts)
        ]
        step = 0
        while waiting or self.rank.queues.live:
            while waiting and waiting[0].arrival * steps_apart <= step:
                self.rank.add(waiting.pop(0))
            for seq_id, token_id in self._step():
                outputs[seq_id].append(token_id)
            step += 1
        return list(outputs.values())

    def run_interrupted(
        self, prompts: Sequence[list[int]], params: SamplingParams, draw: random.Random
    ) -> list[list[int]]:
        """As `run`, but many a step is undone after its forward. Before it is taken again, the
        oldest sequence may leave for a while, and others come in: as when a recovery moves them.
        """
        outputs: dict[SeqId, list[int]] = {SeqId(i): [] for i in range(len(prompts))}
        arrivals = draw.sample(range(len(prompts)), len(prompts))
        waiting = [
            SequenceSpec(SeqId(i), list(prompt), [], params, arrival)
            for i, (prompt, arrival) in enumerate(zip(prompts, arrivals, strict=True))
        ]
        while waiting or self.rank.queues.live:
            interrupted = draw.random() < 0.3
            for seq_id, token_id in self._step(undo=interrupted):
                outputs[seq_id].append(token_id)
            if interrupted and self.rank.queues.running and draw.random() < 0.5:
                waiting.append(self._take_oldest())
            if waiting and (interrupted or not self.rank.queues.live):
                self.rank.add(waiting.pop(draw.randrange(len(waiting))))
        return list(outputs.values())

    def _take_oldest(self) -> SequenceSpec:
        """Remove a sequence with what it has so far."""
        taken = self.rank.queues.running[0]
        self.rank.abort(taken.seq_id)
        return SequenceSpec(
            taken.seq_id, taken.prompt_ids, taken.output_ids, taken.params, taken.order[0]
        )

    def _step(self, undo: bool = False) -> list[tuple[SeqId, int]]:
        batch = self.rank.begin_step()
        if not isinstance(self.rank.agree([StepHeader(*self.rank.header())]), Run):
            self._wake += 1
            self.rank.wake(self._wake)
            return []
        decodes = sum(item.is_decode for item in batch.items)
        self.num_mixed_steps += 0 < decodes < len(batch.items)
        self.rank.mark_executing()
        results = self.runner.execute(batch)
        if undo:
            self.rank.roll_back()
            self.rank.check_invariants()
            return []
        tokens = self.rank.commit(results)
        self.rank.check_invariants()
        self.committed += tokens.tokens
        return [(token.seq_id, token.token_id) for token in tokens.tokens]


def _slots(num_experts: int, masked: Sequence[int] | Set[int]) -> tuple[int, ...]:
    return tuple(EMPTY if e in masked else e for e in range(num_experts))
