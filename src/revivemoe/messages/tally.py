"""What a rank holds, in three numbers: kept by the rank and by the engine alike."""

from typing import NamedTuple

from revivemoe.ids import SeqId


class Tally(NamedTuple):
    """Of live sequences. A value: one thread may replace it while another one reads it."""

    num_sequences: int = 0
    num_output: int = 0
    """Committed output tokens of all of them."""
    ids: int = 0
    """Exclusive or of their ids."""

    def plus(self, seq_id: SeqId, num_output: int) -> "Tally":
        return Tally(self.num_sequences + 1, self.num_output + num_output, self.ids ^ seq_id)

    def minus(self, seq_id: SeqId, num_output: int) -> "Tally":
        return Tally(self.num_sequences - 1, self.num_output - num_output, self.ids ^ seq_id)
