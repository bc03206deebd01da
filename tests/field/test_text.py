"""Text, tokens, offsets, bytes and stop strings agree, whatever the tokens are."""

import json
import re
import time

import msgspec
import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from support.sentencepiece import sentencepiece_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from unit.server.tiny_tokenizer import tiny_tokenizer

from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.stop_strings import Stops
from revivemoe.engine.token_log import TokenGap, TokenLog
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import SamplingParams, finish_reason
from revivemoe.server.logprobs import CompletionLogprobs, TokenNames, chat_logprobs
from revivemoe.server.reply import joined
from revivemoe.streams import StopStrings

KINDS = {"byte-level": tiny_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
VOCABULARIES = {kind: Vocabulary(tokenizer) for kind, tokenizer in KINDS.items()}
STOPS = (
    "the", " cat", "hello", "é", "€", "<|im_end|>", "a<|im_end|>", "<|im_end|>a", "a<|im_end|>b",
    "<|im_end|><|im_start|>", "\ufffd", "\ufffd<|im_end|>", "ab", "aab", " ", "he",
)  # fmt: skip
PARAMS = SamplingParams(seed=1, max_tokens=40, logprobs=2)


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, [(token_id, -0.5), (token_id + 1, -1.5)])


PARTS = (
    *("a", "b", "he", "hello", "t", "h", "s", "é", "€", "Ġ", "Ġâ", "âĤ", "éâ", "Ĥ", "¬"),
    *("▁", "▁the", "▁cat", "<0xE2>", "<0x82>", "<0xAC>", "<0x20>"),
)
SPECIALS = ["<|im_end|>", "<|im_start|>", "</s>"]


def lively(kind):
    """Tokens that are part of some stop string, or of a character."""
    backend = KINDS[kind].backend_tokenizer
    return [i for i in map(backend.token_to_id, [*PARTS, *SPECIALS]) if i is not None]


def spelled(kind, string):
    """Tokens of a string, one for each character or special token."""
    backend = KINDS[kind].backend_tokenizer
    units = re.findall("|".join(map(re.escape, SPECIALS)) + "|.", string, re.DOTALL)
    names = [unit if unit in SPECIALS else {" ": "Ġ"}.get(unit, unit) for unit in units]
    return [i for i in map(backend.token_to_id, names) if i is not None]


@st.composite
def outputs(draw, kind):
    """Prompt, output, how the text is shown and where ranks die."""
    size = len(KINDS[kind]) + 3
    ids = st.sampled_from(lively(kind)) | st.integers(0, size - 1)
    likely = st.sampled_from([spelled(kind, string) for string in STOPS]).filter(bool)
    some = st.lists(st.lists(ids, min_size=1, max_size=3) | likely, min_size=1, max_size=9)
    output = [i for part in draw(some) for i in part]
    return {
        "prompt": draw(st.lists(ids, min_size=1, max_size=6)),
        "output": output,
        "skip": draw(st.booleans()),
        "stop": StopStrings(
            tuple(draw(st.lists(st.sampled_from(STOPS), max_size=3))), draw(st.booleans())
        ),
        "min_tokens": draw(st.integers(0, 3)),
        "eos": draw(st.sampled_from([(), (output[-1],)])),
        "kills": draw(st.lists(st.integers(0, len(output)), max_size=3)),
    }


def params_of(case):
    return msgspec.structs.replace(
        PARAMS,
        max_tokens=len(case["output"]),
        min_tokens=case["min_tokens"],
        eos_token_ids=case["eos"],
    )


def told(kind, case):
    """Text and stop reason by trying every string at every place: `units` are the characters that
    are shown and the tokens that are not.
    """
    vocabulary, stop, params = VOCABULARIES[kind], case["stop"], params_of(case)
    detokenizer = vocabulary.detokenizer(case["prompt"], case["skip"])
    units, hidden = [], set()
    for k, token_id in enumerate(case["output"], start=1):
        reason = finish_reason(params, len(case["prompt"]), case["output"][:k], 1000)
        ends = reason == "stop" and not stop.include_in_output
        text = "" if ends else detokenizer.push(token_id).text
        old = len(units)
        unseen = token_id in vocabulary.specials and (ends or case["skip"])
        named = any(special in s for s in stop.strings for special in vocabulary.specials.values())
        ends_character = reason or (unseen and named and stop.include_in_output)
        units += text + (detokenizer.flush() if ends_character else "")
        if unseen:
            hidden.add(len(units))
            units.append(vocabulary.specials[token_id])
        if k > params.min_tokens and (found := first_match(units, hidden, old, stop.strings)):
            return found if stop.include_in_output else (found[0].removesuffix(found[1]), found[1])
        if reason is not None:
            break
    return shown(units, hidden), None


def shown(units, hidden):
    return "".join(unit for k, unit in enumerate(units) if k not in hidden)


def first_match(units, hidden, old, strings):
    """Text up to where the first string ends, and the string."""
    for end in range(old + 1, len(units) + 1):
        for start in range(end):
            plain = start not in hidden and end - 1 not in hidden
            without = "".join(units[k] for k in range(start, end) if k not in hidden)
            for string in sorted(strings, key=len, reverse=True):
                if string == "".join(units[start:end]) or (plain and string == without):
                    return shown(units[:start], hidden) + string, string
    return None


def run(kind, case, kills=()):
    """All deltas of a choice. A rank that dies tells some tokens again, or skips what was lost."""
    vocabulary = VOCABULARIES[kind]
    log = TokenLog(
        0,
        case["prompt"],
        params_of(case),
        Stops(case["stop"], vocabulary.specials, case["skip"]),
        vocabulary.detokenizer(case["prompt"], case["skip"]),
        1000,
    )
    deltas = []
    for position, token_id in enumerate(case["output"]):
        if position in kills:
            for again in range(max(0, position - 2), position):
                assert log.append(again, case["output"][again], entry(0)) is None
            if not log.sealed and position + 1 < len(case["output"]):
                with pytest.raises(TokenGap):
                    log.append(position + 1, 0, entry(0))
        delta = log.append(position, token_id, entry(token_id))
        if delta is None:
            break
        deltas.append(delta)
    assert log.sealed
    return deltas


def written(kind, deltas):
    """Logprobs of /v1/completions, chunk after chunk."""
    renderer = CompletionLogprobs(TokenNames(VOCABULARIES[kind], as_ids=False))
    chunks = [renderer.render(d.token_ids, d.pieces, d.logprobs) for d in deltas]
    return {name: [x for chunk in chunks for x in chunk[name]] for name in chunks[0]}


def splits_characters(case):
    """A hidden token that a stop string to be shown names ends what is no character yet."""
    return case["skip"] and case["stop"].include_in_output and "<|" in "".join(case["stop"].strings)


def written_out(kind, tokens, stops, include=False, **more):
    """A case by the names of its tokens; `?`: an id that the tokenizer does not know."""
    backend = KINDS[kind].backend_tokenizer
    ids = [len(KINDS[kind]) if t == "?" else backend.token_to_id(t) for t in tokens.split()]
    case = {
        "prompt": ids[:1],
        "output": ids[1:],
        "skip": True,
        "min_tokens": 0,
        "eos": (),
        "kills": [],
    }
    return case | {"stop": StopStrings(tuple(stops), include)} | more


def named_and_not(kind):
    """Cases that chance finds rarely: hidden tokens that some stop string names amid another."""
    backend = KINDS[kind].backend_tokenizer
    end, other = "<|im_end|>", "<|im_start|>" if backend.token_to_id("<|im_start|>") else "</s>"
    last = backend.token_to_id(end)
    cases = [
        written_out(kind, f"s t {end} h s", ["th", f"t{end}hs"], include=True),
        written_out(kind, f"s t {end} h s", ["th", f"x{end}"]),
        written_out(kind, f"s t {end} h s", ["th", f"t{end}h"]),
        written_out(kind, f"s t {end} h s", [f"t{end}h"], include=True),
        written_out(kind, f"s t {end} t s", [f"{end}h"], include=True),
        written_out(kind, f"s t {other} {end}", [f"t{end}"]),
        written_out(kind, f"s t {other} h {end}", [f"{other}h{end}"], skip=False, eos=(last,)),
    ]
    if kind == "sentencepiece":
        cases.append(written_out(kind, "? ▁the", []))

    def with_examples(test):
        for case in cases:
            test = example(case)(test)
        return test

    return with_examples


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_tokens_agree(kind):
    @settings(max_examples=400, deadline=None)
    @given(outputs(kind))
    @named_and_not(kind)
    def holds(case):
        deltas = run(kind, case)
        note(case)
        whole = joined(deltas)
        streamed = written(kind, deltas)
        assert streamed == written(kind, [whole]), "streaming equals not streaming"
        assert "".join(streamed["tokens"]) == whole.text
        for token, offset in zip(streamed["tokens"], streamed["text_offset"], strict=True):
            assert whole.text[offset : offset + len(token)] == token
        raw = b"".join(piece.raw for piece in whole.pieces)
        before = VOCABULARIES[kind].open_bytes(case["prompt"], case["skip"])
        if (raw or whole.text) and not splits_characters(case):
            assert (before + raw).decode(errors="replace") == whole.text
        assert list(whole.token_ids) == case["output"][: len(whole.token_ids)]
        assert len(whole.token_ids) == len(whole.logprobs) == len(whole.pieces)
        if whole.stop_reason is None and not case["eos"]:
            bytes_of = VOCABULARIES[kind].pieces([*case["prompt"], *case["output"]], case["skip"])
            tail = b"".join(p.raw for p in bytes_of[len(case["prompt"]) :])
            assert tail == raw, "every byte of every token"
        assert (whole.text, whole.stop_reason) == told(kind, case)
        names = TokenNames(VOCABULARIES[kind], as_ids=False)
        chat = chat_logprobs(names, whole.token_ids, whole.pieces, whole.logprobs)["content"]
        assert "".join(e["token"] for e in chat) == whole.text
        assert bytes(b for e in chat for b in e["bytes"]) == raw

        after_kills = run(kind, case, case["kills"])
        assert after_kills == deltas, "a kill between two tokens changes nothing"

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_stops_where_its_text_is_a_stop_string(kind):
    tokenizer = KINDS[kind]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    letter = tokenizer.convert_tokens_to_ids("a")
    for skip in (True, False):
        case = {
            "prompt": [letter], "output": [letter, letter, end, letter], "skip": skip,
            "stop": StopStrings(("<|im_end|>",)), "min_tokens": 0, "eos": (),
        }  # fmt: skip
        whole = joined(run(kind, case))
        assert (whole.text, whole.stop_reason) == ("aa", "<|im_end|>")
        assert whole.token_ids == (letter, letter, end)


@pytest.mark.parametrize("ending", [" world", "¬ b"], ids=["broken", "whole"])
def test_an_echo_joins_to_its_text(http, engine, tokenizer, ending):
    """Prompt and output in one: also with special tokens and parts of characters."""
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    prompt = [start, *tokenizer.encode("hello €")[:-1]]
    output = [tokenizer.convert_tokens_to_ids("¬"), *tokenizer.encode(" b")]
    output = output if ending.startswith("¬") else tokenizer.encode(ending)
    engine.script = lambda prompt, choice: output
    for skip in (True, False):
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": len(output),
                "skip_special_tokens": skip}  # fmt: skip
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert choice["text"] == tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)
        alone = http.post("/v1/completions", json={**body, "max_tokens": 0}).json()["choices"][0]
        assert alone["text"] == tokenizer.decode(prompt, skip_special_tokens=skip)


def test_the_prompts_ids_come_with_whatever_comes_first(http, engine, tokenizer):
    """The first token is held back, since a stop string may begin in it."""
    engine.script = lambda prompt, choice: tokenizer.encode("hello b")
    body = {"prompt": [7, 8], "logprobs": 1, "max_tokens": 3, "stop": ["hello world"]}
    body |= {"return_token_ids": True, "stream": True}
    lines = http.post("/v1/completions", json=body).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert chunks[0]["prompt_token_ids"] == [7, 8]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])


def test_a_drawn_token_is_found_among_its_alternatives():
    names, kind = TokenNames(VOCABULARIES["sentencepiece"], as_ids=False), "sentencepiece"
    byte = KINDS[kind].convert_tokens_to_ids(["▁the", "<0xE2>", "<0x82>", "<0xAC>", "<|im_end|>"])
    pieces = VOCABULARIES[kind].pieces(byte)
    told = chat_logprobs(names, byte, pieces, [entry(i) for i in byte])["content"]
    for one in told:
        top = one["top_logprobs"][0]
        assert (top["token"], top["bytes"]) == (one["token"], one["bytes"])


def test_an_echo_of_many_prompts_takes_time_in_proportion(http, engine):
    """Harnesses score lists of token ids by the hundred; the loop that serves everybody goes on."""
    engine.script = lambda prompt, choice: [5]

    def cpu_s(prompts):
        body = {"prompt": [[5] * 200] * prompts, "echo": True, "max_tokens": 0}
        began = time.process_time()
        assert http.post("/v1/completions", json=body).status_code == 200
        return time.process_time() - began

    cpu_s(16)
    assert min(cpu_s(256) for _ in range(2)) < 8 * min(cpu_s(64) for _ in range(3))


@pytest.mark.parametrize(
    ("decoder", "tokens"),
    [
        (decoders.BPEDecoder(), ["the</w>", "cat</w>", "s"]),
        (decoders.CTC(), ["t", "<pad>", "s"]),
        (
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
            ),
            ["▁", "▁the", "s"],
        ),
    ],
)
def test_a_decoder_that_looks_around_is_refused(decoder, tokens):
    backend = Tokenizer(models.BPE(vocab={t: k for k, t in enumerate(tokens)}, merges=[]))
    backend.decoder = decoder
    with pytest.raises(ValueError, match="by their neighbours"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_space_as_a_byte_at_the_beginning():
    """Metaspace drops its own mark there, and no byte."""
    tokens = ["▁the", "<0x20>", "<0x41>", "cat"]
    backend = Tokenizer(models.BPE(vocab={t: k for k, t in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for ids in ([1, 0], [0, 1, 2], [2, 3]):
        assert Vocabulary(tokenizer).decode(ids) == tokenizer.decode(ids)


def test_alternatives_do_not_collide():
    """Two tokens that read the same, and two that are parts of characters."""
    names = TokenNames(VOCABULARIES["sentencepiece"], as_ids=False)
    vocabulary = VOCABULARIES["sentencepiece"]
    the, plain = 4, KINDS["sentencepiece"].convert_tokens_to_ids("the")
    parts = [KINDS["sentencepiece"].convert_tokens_to_ids(f"<0x{b:02X}>") for b in (0xE2, 0xC3)]
    pieces = vocabulary.pieces([the])
    assert pieces[0].text == "the", "the first word of a text has no space"
    tops = [(the, -0.1), (plain, -0.2), *((i, -0.3) for i in parts)]
    rendered = CompletionLogprobs(names).render([the], pieces, [TokenLogprobs(-0.1, tops)])
    top = rendered["top_logprobs"][0]
    assert len(top) == 4, top
    assert top["the"] == -0.1
    assert {"bytes:\\xe2", "bytes:\\xc3"} <= set(top)


def test_work_per_token_is_bounded():
    """Bytes that never make a character, a hundred thousand times: no window grows."""
    vocabulary = VOCABULARIES["sentencepiece"]
    byte = KINDS["sentencepiece"].convert_tokens_to_ids("<0xE2>")
    began = time.perf_counter()
    assert vocabulary.decode([byte] * 100_000) == "\ufffd" * 100_000
    assert time.perf_counter() - began < 5


def test_a_prompt_as_long_as_the_context_can_be_scored(http, engine):
    limit = engine.model.max_model_len
    for max_tokens, num in ((0, limit), (1, limit + 1), (16, limit + 1)):
        body = {"prompt": [5] * limit, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert len(choice["logprobs"]["token_logprobs"]) == num
        assert choice["finish_reason"] == "length"
    body = {"prompt": [5] * (limit + 1), "echo": True, "logprobs": 1, "max_tokens": 0}
    assert http.post("/v1/completions", json=body).status_code == 400
    assert http.post("/v1/completions", json={"prompt": [5] * limit}).status_code == 400
