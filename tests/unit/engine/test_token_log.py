import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.server.tiny_tokenizer import tiny_tokenizer

from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.stop_strings import StopMatcher, Stops
from revivemoe.engine.token_log import TokenGap, TokenLog
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import SamplingParams
from revivemoe.streams import StopStrings

TOKENIZER = tiny_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
EOS = TOKENIZER.eos_token_id
PARAMS = SamplingParams(seed=1, max_tokens=100, eos_token_ids=(EOS,))
LOGPROBS = TokenLogprobs(-1.0, [(7, -1.0)])


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def make_log(stop=(), include=False, prompt_len=3, **params) -> TokenLog:
    return TokenLog(
        index=5,
        prompt_ids=list(range(prompt_len)),
        params=msgspec.structs.replace(PARAMS, **params),
        stops=Stops(StopStrings(tuple(stop), include), VOCABULARY.specials),
        detokenizer=VOCABULARY.detokenizer(),
        max_model_len=1000,
    )


def feed(log: TokenLog, token_ids, logprobs=None) -> list:
    start = len(log.output_ids)
    deltas = [log.append(start + k, i, logprobs) for k, i in enumerate(token_ids)]
    return [delta for delta in deltas if delta is not None]


def text_of(deltas) -> str:
    return "".join(delta.text for delta in deltas)


# ---- idempotence ----------------------------------------------------------------------------


def test_a_token_is_appended_once():
    log = make_log()
    first = log.append(0, 10)
    assert (first.index, first.token_ids, first.finish_reason) == (5, (10,), None)
    assert log.append(0, 10) is None
    assert log.append(0, 11) is None, "a stale token of an old owner"
    assert log.output_ids == [10]


def test_a_gap_is_told_and_changes_nothing():
    log = make_log()
    log.append(0, 10)
    with pytest.raises(TokenGap) as gap:
        log.append(3, 11)
    assert (gap.value.expected, gap.value.got) == (1, 3)
    assert log.output_ids == [10]
    assert log.append(1, 11).token_ids == (11,)


def test_a_sealed_log_takes_nothing_not_even_a_gap():
    log = make_log()
    log.seal()
    assert log.append(0, 10) is None
    assert log.append(9, 10) is None
    assert log.append_prompt_logprobs(1, [LOGPROBS]) is None
    assert log.finish_reason is None


@given(st.lists(st.integers(0, 8), max_size=60))
def test_any_order_of_arrival_with_fetches_gives_each_token_once(positions):
    source = ids_of("hello world")[:1] * 4 + ids_of("abcde")
    log, sent = make_log(), []
    for position in positions:
        if position > len(sent):
            with pytest.raises(TokenGap):
                log.append(position, source[position])
            continue
        delta = log.append(position, source[position])
        sent += delta.token_ids if delta else ()
    assert sent == log.output_ids == source[: len(sent)]


# ---- how it ends ----------------------------------------------------------------------------


def test_max_tokens():
    deltas = feed(make_log(max_tokens=2), ids_of("abc"))
    assert [d.finish_reason for d in deltas] == [None, "length"]
    assert text_of(deltas) == "ab"


def test_the_context_is_full():
    deltas = feed(make_log(prompt_len=998), ids_of("abc"))
    assert [d.finish_reason for d in deltas] == [None, "length"]


def test_eos_is_in_the_ids_and_not_in_the_text():
    log = make_log()
    deltas = feed(log, [*ids_of("ab"), EOS, *ids_of("c")])
    assert text_of(deltas) == "ab"
    assert log.output_ids == [*ids_of("ab"), EOS]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)


def test_a_stop_token_is_in_the_ids_and_not_in_the_text():
    b = ids_of("b")[0]
    deltas = feed(make_log(stop_token_ids=(b,)), ids_of("abc"))
    assert text_of(deltas) == "a"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", b)


def test_a_stop_token_is_in_the_text_when_stops_are_included():
    deltas = feed(make_log(stop_token_ids=(ids_of("b")[0],), include=True), ids_of("abc"))
    assert text_of(deltas) == "ab"


def test_an_incomplete_character_is_flushed_at_the_end():
    deltas = feed(make_log(max_tokens=2), ids_of("€"))
    assert [d.text for d in deltas] == ["", "\ufffd"]


# ---- stop strings ---------------------------------------------------------------------------


def test_text_that_may_begin_a_stop_string_is_held_while_ids_stream():
    log = make_log(stop=["bcd"])
    deltas = feed(log, ids_of("abcx"))
    assert [d.text for d in deltas] == ["a", "", "", "bcx"]
    assert all(len(d.token_ids) == 1 for d in deltas)


def test_log_probabilities_are_held_with_the_text_they_belong_to():
    log = make_log(stop=["bcd"], logprobs=0)
    deltas = feed(log, ids_of("abcx"), LOGPROBS)
    assert [len(d.logprobs) for d in deltas] == [1, 0, 0, 3]
    assert [len(d.token_ids) for d in deltas] == [1, 0, 0, 3]


def test_a_stop_string_that_is_a_special_token_stops():
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    log = make_log(stop=["b<|im_start|>"], logprobs=0)
    deltas = feed(log, [*ids_of("ab"), start], LOGPROBS)
    assert text_of(deltas) == "a"
    assert deltas[-1].stop_reason == "b<|im_start|>"
    assert [piece.text for d in deltas for piece in d.pieces] == ["a", "", ""]


def test_a_hidden_special_token_completes_no_other_stop_string():
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    log = make_log(stop=["<", "<|im_end|>"])
    assert text_of(feed(log, [*ids_of("a"), start, *ids_of("b")])) == "ab"
    assert not log.sealed


def test_a_special_token_is_shown_where_its_stop_string_is_included():
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    log = make_log(stop=["<|im_start|>"], include=True)
    assert text_of(feed(log, [*ids_of("a"), start])) == "a<|im_start|>"


def test_a_stop_string_across_tokens_ends_the_choice():
    log = make_log(stop=["zz", "lo wo"])
    ids = ids_of("hello world")
    assert len(ids) == 2
    deltas = feed(log, [*ids, *ids_of("more")])
    assert text_of(deltas) == "hel"
    assert log.output_ids == ids, "up to the token that completed it"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "lo wo")
    assert log.sealed


def test_the_stop_string_is_kept_where_asked_for_and_nothing_is_held():
    deltas = feed(make_log(stop=["bcd"], include=True), ids_of("abcdef"))
    assert [d.text for d in deltas] == ["a", "b", "c", "d"]


def test_held_text_is_released_when_the_choice_ends_otherwise():
    assert text_of(feed(make_log(stop=["bcd"], max_tokens=3), ids_of("abc"))) == "abc"
    assert text_of(feed(make_log(stop=["bcd"]), [*ids_of("abc"), EOS])) == "abc"


def test_a_stop_string_completed_by_the_last_token_wins_over_length():
    deltas = feed(make_log(stop=["bc"], max_tokens=3), ids_of("abc"))
    assert (text_of(deltas), deltas[-1].stop_reason) == ("a", "bc")


def test_stop_strings_within_min_tokens_do_not_count():
    log = make_log(stop=["b"], min_tokens=2)
    deltas = feed(log, ids_of("abcab"))
    assert text_of(deltas) == "abca"
    assert deltas[-1].stop_reason == "b"


def test_a_match_that_ends_beyond_min_tokens_counts():
    deltas = feed(make_log(stop=["bc"], min_tokens=2), ids_of("abcd"))
    assert text_of(deltas) == "a"


def test_a_match_within_min_tokens_does_not_come_back_later():
    matcher = StopMatcher(Stops(StopStrings(("ab", "xaby"))))
    assert matcher.push("xab", armed=False).text == ""
    released = matcher.push("z")
    assert (released.text, released.stop) == ("xabz", None)


def naive(text: str, stops, include: bool, unarmed: int = 0) -> tuple[str, str | None]:
    """The first stop string to be completed in the whole text beyond its unarmed beginning."""
    for end in range(unarmed + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.integers(0, 4),
    stop_lists,
    st.booleans(),
)
def test_the_matcher_equals_a_search_of_the_whole_text(pieces, num_unarmed, stops, include):
    matcher, got, stop = StopMatcher(Stops(StopStrings(tuple(stops), include))), "", None
    for k, piece in enumerate(pieces):
        released = matcher.push(piece, armed=k >= num_unarmed)
        got, stop = got + released.text, released.stop
        if stop is not None:
            break
    else:
        got += matcher.flush()
    unarmed = len("".join(pieces[:num_unarmed]))
    assert (got, stop) == naive("".join(pieces), stops, include, unarmed)


@given(st.text("abché €lo w", max_size=20), stop_lists, st.booleans())
def test_a_log_equals_a_search_of_the_whole_text(text, stops, include):
    log = make_log(stop=stops, include=include)
    deltas = feed(log, [*ids_of(text), EOS])
    want, stop = naive(text, stops, include)
    assert (text_of(deltas), deltas[-1].stop_reason) == (want, stop)
    assert [i for d in deltas for i in d.token_ids] == log.output_ids
    assert stop is None or TOKENIZER.decode(log.output_ids).find(stop) >= 0


@given(st.text("abc", max_size=20), st.text("abc", min_size=1, max_size=4))
def test_no_more_is_held_than_a_stop_string_could_need(text, stop):
    matcher = StopMatcher(Stops(StopStrings((stop,))))
    sent = "".join(matcher.push(char, armed=False).text for char in text)
    held = text[len(sent) :]
    assert text.startswith(sent)
    assert stop.startswith(held)
    assert len(held) < len(stop)


# ---- the rest -------------------------------------------------------------------------------


def test_degraded_accumulates():
    log = make_log()
    before = feed(log, ids_of("a"))
    log.mark_degraded()
    after = feed(log, ids_of("bc"))
    assert [d.degraded for d in before + after] == [False, True, True]


def test_logprobs_ride_with_their_token():
    log = make_log(logprobs=1)
    deltas = feed(log, ids_of("ab"), LOGPROBS)
    assert [d.logprobs for d in deltas] == [(LOGPROBS,), (LOGPROBS,)]
    assert log.logprobs == [LOGPROBS, LOGPROBS]
    assert feed(make_log(), ids_of("a"), LOGPROBS)[0].logprobs == (), "nobody asked"


def entries(*values: float) -> list[TokenLogprobs]:
    return [TokenLogprobs(v, []) for v in values]


def test_prompt_logprobs_are_given_once_complete():
    log = make_log(prompt_len=5)
    assert log.append_prompt_logprobs(1, entries(1, 2)) is None
    assert log.append_prompt_logprobs(1, entries(1, 2)) is None
    assert log.num_prompt_logprobs == 2
    with pytest.raises(TokenGap) as gap:
        log.append_prompt_logprobs(4, entries(4))
    assert gap.value.expected == 3
    assert log.append_prompt_logprobs(2, entries(2, 3, 4)) == tuple(entries(1, 2, 3, 4))
    assert log.append_prompt_logprobs(2, entries(2, 3, 4)) is None


def test_no_token_comes_before_the_prompt_is_scored() -> None:
    """What was lost with a report is missed at the next token, not at the end of the stream."""
    log = make_log(prompt_logprobs=1)
    with pytest.raises(TokenGap):
        log.append(0, 7)
    log.append_prompt_logprobs(1, [LOGPROBS] * 2)
    assert log.append(0, 7) is not None
