"""A step cut into micro-batches: everything once, in order, and about as much in each."""

import pytest
from core_harness import spec
from hypothesis import given
from hypothesis import strategies as st

from revivemoe.core.microbatches import split
from revivemoe.core.sequence import Sequence
from revivemoe.core.step import ScheduledSequence


def items(*counts: int) -> list[ScheduledSequence]:
    """Sequences with so many tokens in the step."""
    return [
        ScheduledSequence(Sequence.from_spec(spec(i, [1] * n)), 0, n, (), samples=True)
        for i, n in enumerate(counts)
    ]


def counts(pieces: list[tuple[ScheduledSequence, ...]]) -> list[list[int]]:
    return [[item.count for item in piece] for piece in pieces]


COUNTS = st.lists(st.one_of(st.just(1), st.integers(1, 12), st.integers(1, 600)), max_size=40)
PIECES = st.integers(1, 6)


@given(COUNTS, PIECES)
def test_every_sequence_is_in_one_piece_in_its_order(tokens: list[int], count: int) -> None:
    given_items = items(*tokens)
    pieces = split(given_items, count)
    assert len(pieces) == count
    assert [id(item) for piece in pieces for item in piece] == [id(item) for item in given_items]


@given(COUNTS, PIECES)
def test_no_piece_has_much_more_than_its_share(tokens: list[int], count: int) -> None:
    largest = max(tokens, default=0)
    for piece in counts(split(items(*tokens), count)):
        assert sum(piece) * count <= sum(tokens) + largest * count


@given(COUNTS, PIECES)
def test_no_piece_has_much_less_than_its_share(tokens: list[int], count: int) -> None:
    largest = max(tokens, default=0)
    for piece in counts(split(items(*tokens), count)):
        assert sum(piece) * count >= sum(tokens) - largest * count


@given(st.integers(1, 12), st.integers(1, 30), PIECES)
def test_equal_sequences_are_spread_evenly(each: int, tokens: int, count: int) -> None:
    pieces = split(items(*[tokens] * (each * count)), count)
    assert [len(piece) for piece in pieces] == [each] * count


@given(COUNTS)
def test_one_piece_is_the_whole_step(tokens: list[int]) -> None:
    given_items = items(*tokens)
    assert split(given_items, 1) == [tuple(given_items)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), [[], []]),
        ((5,), [[], [5]]),
        ((1, 1), [[1], [1]]),
        ((1, 1, 1), [[1], [1, 1]]),
        ((8, 1, 1), [[8], [1, 1]]),
        ((1, 1, 8), [[1, 1], [8]]),
        ((3, 3, 2, 2, 2), [[3, 3], [2, 2, 2]]),
    ],
    ids=str,
)
def test_two_pieces(tokens: tuple[int, ...], expected: list[list[int]]) -> None:
    assert counts(split(items(*tokens), 2)) == expected


def test_more_pieces_than_sequences_leave_some_empty() -> None:
    assert sorted(counts(split(items(4, 4), 4))) == [[], [], [4], [4]]
    assert counts(split([], 3)) == [[], [], []]
