"""Rows of a step whose logits are needed, and the end of the model that makes them.

A prompt whose log-probabilities are asked for needs the logits of all its rows: with a large
vocabulary more than there is memory for. So they are made, and used, a slice at a time.

Legend: R rows, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from revivemoe.core.step import ScheduledSequence

LOGITS_BYTES = 64 << 20
"""Of a slice, in float32."""
MIN_ROWS = 16
"""A slice of fewer rows may be rounded otherwise by the library that multiplies."""


class KeptRow(NamedTuple):
    """A row whose logits are needed: for the log-probability of a token, or to draw one."""

    item: int
    """Index of its sequence in the step."""
    row: int
    """Of the micro-batch."""
    target: int | None
    """The prompt's next token; None: one is to be drawn."""


def kept_rows(items: Sequence[ScheduledSequence]) -> list[KeptRow]:
    """Of one micro-batch: prompt rows first, then the one to draw from, sequence by sequence."""
    kept: list[KeptRow] = []
    row = 0
    for number, item in enumerate(items):
        targets = item.sequence.prompt_ids[item.start + 1 :][: item.num_prompt_logprobs]
        kept += [KeptRow(number, row + i, target) for i, target in enumerate(targets)]
        if item.samples:
            kept.append(KeptRow(number, row + item.count - 1, None))
        row += item.count
    return kept


def in_slices(kept: Sequence[KeptRow], most: int) -> list[list[int]]:
    """Indices of rows whose logits are made at once: all, or, if there are more than `most` and
    some of a prompt, those of prompts in even slices, after those to draw from.
    """
    scored = [i for i, row in enumerate(kept) if row.target is not None]
    if len(kept) <= most or not scored:
        return [list(range(len(kept)))]
    drawn = [i for i, row in enumerate(kept) if row.target is None]
    count = -(-len(scored) // most)
    ends = [len(scored) * i // count for i in range(count + 1)]
    slices = [scored[a:b] for a, b in pairwise(ends)]
    return [drawn, *slices] if drawn else slices


class Head:
    """Turns hidden states into logits, as the family does it, without the rest of the model."""

    def __init__(self, model: Any) -> None:
        """`model`: one with a language model's head."""
        self._model, self._body = model, model.base_model
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.most = max(MIN_ROWS, LOGITS_BYTES // (4 * vocabulary))
        """Rows of a slice."""
        self.wanted = False
        """The logits of the present step are made in slices."""
        self._out: Any = None
        self._body.register_forward_hook(self._keep)

    def _keep(self, body: nn.Module, inputs: object, out: Any) -> None:
        self._out = out if self.wanted else None  # it is large, and not needed otherwise

    def hidden(self) -> Tensor:
        """What the model's body has put out last, [R, H]."""
        hidden: Tensor = self._out.last_hidden_state[0]
        return hidden

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, V]. Nothing else of the model is run: its body puts these rows out."""
        out = type(self._out)(**{**self._out, "last_hidden_state": hidden_RH[None]})
        self._body.forward = lambda *_, **__: out
        try:
            logits: Tensor = self._model(inputs_embeds=hidden_RH[None], use_cache=False).logits[0]
        finally:
            del self._body.forward
        return logits
