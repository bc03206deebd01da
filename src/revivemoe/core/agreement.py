"""What the members of a domain make of each other's headers: the same verdict everywhere."""

from collections import abc

from revivemoe.core.step import Agreement, Leave, Park, Retry, Run, StepHeader
from revivemoe.ids import Epoch


class Disagreement(RuntimeError):
    """Members met in different epochs or steps: the fence between epochs has a hole."""


def agree(headers: abc.Sequence[StepHeader]) -> Agreement:
    """Decide on the step that these members (in logical order) are about to take.

    A pure function of what all have exchanged, so all come to the same decision.
    Raises `Disagreement` if they are not about to take the same step of the same epoch.
    """
    if len({(header.epoch, header.step) for header in headers}) != 1:
        met = ", ".join(f"{i}: epoch {h.epoch} step {h.step}" for i, h in enumerate(headers))
        raise Disagreement(f"members (by logical rank) are not at the same step: {met}")
    if (epoch := max(header.leave for header in headers)) > headers[0].epoch:
        return Leave(Epoch(epoch))
    if any(header.num_tokens for header in headers):
        return Run(tokens_per_member=tuple(header.num_tokens for header in headers))
    if any(header.has_work for header in headers):
        return Retry()
    return Park() if len({header.wake for header in headers}) == 1 else Retry()
