"""What lies in a rank's expert slots, in truth: the one record, whoever fills them.

    begin: the slots are EMPTY, since nobody knows what has been overwritten yet
    check, write, fill: one slot after another
    begin of a later load: the slots it names are its own, and no earlier load may write them

So a slot names an expert only if all of it lies there and nothing is about to overwrite it.
"""

from collections.abc import Iterable, Mapping, Sequence

from revivemoe.ids import ExpertId, LayerId, SlotId
from revivemoe.membership.placement import EMPTY, Table
from revivemoe.messages.commands import SlotLoad


class SlotTaken(Exception):
    """A later load has been told to fill a slot of this one."""


class ExpertSlots:
    """One rank's slots. Whoever loads in a thread of its own keeps others out from `check` to
    `fill`, and from `begin`; the table may be read at any time.
    """

    def __init__(self, held: Mapping[LayerId, Sequence[int]]) -> None:
        """`held[layer]`: the expert in each slot, or EMPTY. The same number in every layer."""
        self._held = {layer: list(row) for layer, row in sorted(held.items())}
        self._load_of = {layer: [0] * len(row) for layer, row in self._held.items()}
        """The last load that was told to fill each slot."""
        self._last_load = 0

    @property
    def table(self) -> Table:
        """[L][S], by layer; () without slots."""
        return tuple(tuple(row) for row in self._held.values()) if self.num_slots else ()

    @property
    def num_slots(self) -> int:
        """Of each layer."""
        return max(map(len, self._held.values()), default=0)

    def row(self, layer: LayerId) -> tuple[int, ...]:
        """The expert in each slot of a layer."""
        return tuple(self._held[layer])

    def lacking(self, table: Table) -> tuple[SlotLoad, ...]:
        """What `table`, [L][S] or (), has that does not lie here yet."""
        return tuple(
            SlotLoad(layer, SlotId(slot), ExpertId(expert))
            for (layer, row), given in zip(self._held.items(), table, strict=bool(table))
            for slot, expert in enumerate(given)
            if expert not in (EMPTY, row[slot])
        )

    def begin(self, loads: Iterable[SlotLoad]) -> int:
        """A load begins, which is told to fill these slots. Returns its number."""
        self._last_load += 1
        for load in loads:
            self._held[load.layer][load.slot] = EMPTY
            self._load_of[load.layer][load.slot] = self._last_load
        return self._last_load

    def check(self, number: int, load: SlotLoad) -> None:
        """Before a slot is written. Raises SlotTaken if it is not this load's any more."""
        row = self._load_of[load.layer]
        if load.slot >= len(row) or row[load.slot] != number:
            raise SlotTaken(f"slot {load.slot} of layer {load.layer} was given to a later load")

    def fill(self, load: SlotLoad) -> None:
        """All of the expert lies in its slot."""
        self._held[load.layer][load.slot] = load.expert

    def resize(self, num_slots: int) -> None:
        """So many slots in every layer, all of them empty. No load under way may go on."""
        for layer in self._held:
            self._held[layer] = [EMPTY] * num_slots
            self._load_of[layer] = [0] * num_slots
