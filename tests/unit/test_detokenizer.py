import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sentencepiece import BOS, CAT, NUM_BYTES_FROM, THE, sentencepiece_tokenizer
from unit.server.tiny_tokenizer import tiny_tokenizer

from revivemoe.detokenizer import REPLACEMENT, Vocabulary

TOKENIZER = tiny_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
any_ids = st.lists(st.integers(0, len(TOKENIZER) + 3), max_size=40)


def pieces(vocabulary: Vocabulary, ids, prompt=(), skip=True) -> list[str]:
    detokenizer = vocabulary.detokenizer(prompt, skip)
    return [*(detokenizer.push(i).text for i in ids), detokenizer.flush()]


@given(any_ids, st.booleans())
def test_any_ids_give_the_text_of_decode(ids, skip):
    text = "".join(pieces(VOCABULARY, ids, skip=skip))
    assert text == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_any_text_comes_back_with_no_broken_character(text):
    got = pieces(VOCABULARY, TOKENIZER.encode(text), skip=False)  # it may name a special token
    assert "".join(got) == text
    assert got[-1] == "", "whole characters are not held back"
    assert all(REPLACEMENT not in piece for piece in got) or REPLACEMENT in text


def test_a_character_is_held_until_it_is_whole():
    assert pieces(VOCABULARY, TOKENIZER.encode("a€"))[:4] == ["a", "", "", "€"]


def test_an_incomplete_end_is_flushed_as_replacement():
    ids = TOKENIZER.encode("a€")[:-1]
    assert pieces(VOCABULARY, ids) == ["a", "", "", REPLACEMENT]


def test_special_tokens_have_no_text_and_split_no_character():
    euro = TOKENIZER.encode("€")
    ids = [*euro[:1], TOKENIZER.eos_token_id, *euro[1:]]
    assert "".join(pieces(VOCABULARY, ids)) == "€"


def test_token_bytes_of_half_a_character_and_of_added_tokens():
    assert VOCABULARY.token_bytes(TOKENIZER.encode("é")[0]) == b"\xc3"
    assert VOCABULARY.token_text(TOKENIZER.encode("é")[0]) == "bytes:\\xc3"
    assert VOCABULARY.token_text(TOKENIZER.eos_token_id) == "<|im_end|>"
    assert VOCABULARY.token_text(TOKENIZER.convert_tokens_to_ids("ein Wört")) == "ein Wört"
    assert VOCABULARY.token_bytes(10**6) == b""


SENTENCEPIECE = sentencepiece_tokenizer()
WORDS = Vocabulary(SENTENCEPIECE)


@given(st.lists(st.integers(0, NUM_BYTES_FROM - 1), max_size=30), st.booleans())
def test_sentencepiece_words_give_the_text_of_decode(ids, skip):
    got = "".join(pieces(WORDS, ids, skip=skip))
    assert got == SENTENCEPIECE.backend_tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=20))
def test_sentencepiece_text_comes_back(text):
    ids = SENTENCEPIECE.encode(text, add_special_tokens=True)
    assert "".join(pieces(WORDS, ids)) == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=20))
def test_sentencepiece_bytes_never_show_a_broken_character(text):
    got = pieces(WORDS, [NUM_BYTES_FROM + b for b in text.encode()], prompt=[THE])
    assert "".join(got) == text
    assert all(REPLACEMENT not in piece for piece in got) or REPLACEMENT in text


def test_sentencepiece_keeps_the_space_between_prompt_and_output():
    assert "".join(pieces(WORDS, [CAT], prompt=[THE])) == " cat"
    assert "".join(pieces(WORDS, [CAT], prompt=[BOS])) == "cat", "nothing is before it"
    assert WORDS.token_text(CAT) == " cat"


def test_a_tokenizer_without_backend_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Vocabulary(object())
