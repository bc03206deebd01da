"""What each process ought to hold, and whether it says so.

A token that is lost on its way shows by the next one of its sequence. Behind a last token no other
comes: only the rank's own count can tell, which every heartbeat brings behind the tokens it counts.
So the two counts differ by what is on its way to the rank, and for no longer than that takes. One
that goes on differing is asked what it holds; its answer is exact for all that it was given before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from revivemoe.engine.requests import Owner
from revivemoe.ids import RankId, SeqId
from revivemoe.messages.tally import Tally

DIFFERS_S = 1.0
"""In every heartbeat for so long, before the rank is asked."""
ANSWER_S = 5.0
"""For an answer; then it is asked again."""
MAX_QUESTIONS = 5
"""Without an answer, and without agreeing once. A rank that is stuck is the detector's."""


@dataclass
class Held:
    """A sequence, and where it is."""

    owner: Owner
    num_output: int
    since: int
    """The last question, to anybody, before it was handed over."""


@dataclass
class Doubt:
    """A process whose own count differs."""

    ask_at: float
    questions: int = 0
    request: int | None = None
    """Of the last question."""


class Holdings:
    """Of all processes. A change or a heartbeat takes the same time, however much is held."""

    def __init__(self) -> None:
        self._held: dict[SeqId, Held] = {}
        self._tallies: dict[Owner, Tally] = {}
        self._doubts: dict[Owner, Doubt] = {}
        self._last_request = 0

    # ---- what ought to be held ---------------------------------------------------------------

    def hand_over(self, seq_id: SeqId, owner: Owner, num_output: int) -> None:
        """From now on it is there, and nowhere else."""
        self.drop(seq_id)
        self._held[seq_id] = Held(owner, num_output, self._last_request)
        self._tallies[owner] = self.tally(owner).plus(seq_id, num_output)

    def grow(self, seq_id: SeqId, num_output: int) -> None:
        """So many of its tokens are in the log by now."""
        held = self._held[seq_id]
        count, total, ids = self._tallies[held.owner]
        self._tallies[held.owner] = Tally(count, total + num_output - held.num_output, ids)
        held.num_output = num_output

    def drop(self, seq_id: SeqId) -> None:
        """It is finished, or nowhere."""
        held = self._held.pop(seq_id, None)
        if held is None:
            return
        left = self._tallies[held.owner].minus(seq_id, held.num_output)
        if left.num_sequences:
            self._tallies[held.owner] = left
        else:
            del self._tallies[held.owner]

    def lose(self, rank: RankId) -> None:
        """Its process is out, and all that it held."""
        for seq_id in [s for s, held in self._held.items() if held.owner[0] == rank]:
            self.drop(seq_id)
        self._doubts = {owner: d for owner, d in self._doubts.items() if owner[0] != rank}

    def owner_of(self, seq_id: SeqId) -> Owner | None:
        held = self._held.get(seq_id)
        return None if held is None else held.owner

    def of(self, owner: Owner) -> list[SeqId]:
        return [seq_id for seq_id, held in self._held.items() if held.owner == owner]

    def tally(self, owner: Owner) -> Tally:
        """What the process should tell."""
        return self._tallies.get(owner, Tally())

    # ---- what is said to be held -------------------------------------------------------------

    def doubtful(self, owner: Owner, told: Tally, now: float) -> int | None:
        """Take in a heartbeat. Returns the number of the question to ask the rank now, if any."""
        if told == self.tally(owner):
            self._doubts.pop(owner, None)
            return None
        doubt = self._doubts.setdefault(owner, Doubt(now + DIFFERS_S))
        if now < doubt.ask_at or doubt.questions == MAX_QUESTIONS:
            return None
        self._last_request += 1
        doubt.request, doubt.questions = self._last_request, doubt.questions + 1
        doubt.ask_at = now + ANSWER_S
        return doubt.request

    def answers(self, owner: Owner, request: int) -> bool:
        """Whether an answer is that to the last question, which is settled with it."""
        doubt = self._doubts.get(owner)
        if doubt is None or doubt.request != request:
            return False
        del self._doubts[owner]
        return True

    def forget_doubts(self) -> None:
        """All are fenced, and tell what they hold with that."""
        self._doubts.clear()

    def differences(
        self, owner: Owner, num_output: Mapping[SeqId, int], request: int | None = None
    ) -> tuple[list[SeqId], list[SeqId]]:
        """What is to be handed over again, and what the process holds and should not.

        `request`: it was told in answer to this question. What was handed over since, it may not
        have had then. None: with a fence, behind everything.
        """
        wrong = [
            seq_id
            for seq_id in self.of(owner)
            if num_output.get(seq_id) != self._held[seq_id].num_output
            and (request is None or self._held[seq_id].since < request)
        ]
        return wrong, [seq_id for seq_id in num_output if self.owner_of(seq_id) != owner]
