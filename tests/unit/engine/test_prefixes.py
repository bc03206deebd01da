"""What is known of the ranks' prefix caches."""

from hypothesis import given
from hypothesis import strategies as st

from revivemoe.engine.prefixes import MOST_NAMES, MOST_PIECES, PIECE, Prefixes, names_of
from revivemoe.ids import RankId

A, B = RankId(0), RankId(1)


@given(st.integers(0, 5 * PIECE), st.integers(0, 5 * PIECE), st.integers(0, 5 * PIECE))
def test_as_long_as_the_common_beginning_in_whole_pieces(both: int, one: int, other: int) -> None:
    common = list(range(both))
    prefixes = Prefixes()
    prefixes.note(A, names_of([*common, *range(10_000, 10_000 + one)]))
    names = names_of([*common, *range(20_000, 20_000 + other)])
    assert prefixes.tokens(A, names) == both // PIECE * PIECE
    assert prefixes.tokens(B, names) == 0


def test_the_same_piece_elsewhere_is_another() -> None:
    prefixes = Prefixes()
    prefixes.note(A, names_of(list(range(2 * PIECE))))
    assert prefixes.tokens(A, names_of(list(range(PIECE, 2 * PIECE)))) == 0


def test_what_is_gone_is_forgotten() -> None:
    names, prefixes = names_of(list(range(PIECE))), Prefixes()
    prefixes.note(A, names)
    prefixes.forget(A)
    prefixes.forget(B)
    assert prefixes.tokens(A, names) == 0


def test_bounded() -> None:
    assert len(names_of(list(range(100 * PIECE)))) == MOST_PIECES
    first, prefixes = names_of([-1] * PIECE), Prefixes()
    prefixes.note(A, first)
    for number in range(MOST_NAMES):
        prefixes.note(A, names_of([number] * PIECE))
    assert prefixes.tokens(A, first) == 0
    assert prefixes.tokens(A, names_of([1] * PIECE)) == PIECE
