"""What a rank says its expert slots hold, in whatever order loads begin, end and fail."""

import pytest

from revivemoe.core.slots import ExpertSlots, SlotTaken
from revivemoe.ids import ExpertId, LayerId, SlotId
from revivemoe.messages.commands import SlotLoad

FIRST, SECOND = LayerId(3), LayerId(7)


def load(layer: LayerId, slot: int, expert: int) -> SlotLoad:
    return SlotLoad(layer, SlotId(slot), ExpertId(expert))


@pytest.fixture
def slots() -> ExpertSlots:
    return ExpertSlots({SECOND: (4, -1), FIRST: (0, 1)})


def test_rows_are_in_the_order_of_the_layers(slots: ExpertSlots) -> None:
    assert slots.table == ((0, 1), (4, -1))
    assert (slots.num_slots, slots.row(SECOND)) == (2, (4, -1))


def test_without_slots_there_is_no_table() -> None:
    slots = ExpertSlots({FIRST: (), SECOND: ()})
    assert (slots.table, slots.num_slots, slots.lacking(())) == ((), 0, ())
    slots.resize(2)
    assert slots.table == ((-1, -1), (-1, -1))


def test_a_slot_is_empty_until_its_expert_is_there(slots: ExpertSlots) -> None:
    wanted = [load(FIRST, 1, 5), load(SECOND, 1, 6)]
    number = slots.begin(wanted)
    assert slots.table == ((0, -1), (4, -1)), "what lay there may be half overwritten"
    slots.check(number, wanted[1])
    slots.fill(wanted[1])
    assert slots.table == ((0, -1), (4, 6)), "one has failed, or is still to come"


def test_what_is_lacking(slots: ExpertSlots) -> None:
    assert slots.lacking(((0, 2), (-1, 4))) == (load(FIRST, 1, 2), load(SECOND, 1, 4))
    assert slots.lacking(()) == (), "without the expert role"
    slots.begin([load(FIRST, 0, 9)])
    assert slots.lacking(((0, 1), (4, -1))) == (load(FIRST, 0, 0),), "it was there before"
    with pytest.raises(ValueError, match="shorter"):
        slots.lacking(((0, 1),))


def test_a_later_load_ends_an_earlier_ones_right_to_a_slot(slots: ExpertSlots) -> None:
    early = slots.begin([load(FIRST, 0, 5), load(FIRST, 1, 6)])
    late = slots.begin([load(FIRST, 1, 7)])
    with pytest.raises(SlotTaken, match="slot 1 of layer 3"):
        slots.check(early, load(FIRST, 1, 6))
    slots.check(early, load(FIRST, 0, 5))
    slots.check(late, load(FIRST, 1, 7))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_load_survives_another_number_of_slots(slots: ExpertSlots, width: int) -> None:
    number = slots.begin([load(FIRST, 1, 5)])
    slots.resize(width)
    assert slots.table == ((-1,) * width,) * 2
    with pytest.raises(SlotTaken):
        slots.check(number, load(FIRST, 1, 5))
