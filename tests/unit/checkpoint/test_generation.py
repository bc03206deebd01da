"""Sampling defaults from `generation_config.json`."""

import json
from dataclasses import replace

import pytest

from revivemoe.checkpoint.generation import sampling_defaults
from revivemoe.sampling_params import SamplingDefaults


def written(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_what_the_file_says(tmp_path):
    fields = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "max_new_tokens": 7}
    written(tmp_path, **fields, repetition_penalty=1.05, do_sample=True, eos_token_id=[1])
    found = SamplingDefaults(0.6, 0.95, 20, 0, 1.05, 7)
    assert sampling_defaults("auto", tmp_path) == found
    assert sampling_defaults("vllm", tmp_path) == SamplingDefaults()
    limited = replace(found, max_tokens_limit=7)
    assert sampling_defaults(str(tmp_path), tmp_path / "elsewhere") == limited


def test_nothing_said(tmp_path):
    assert sampling_defaults("auto", tmp_path) == SamplingDefaults()
    assert sampling_defaults("auto", written(tmp_path, top_k=None)) == SamplingDefaults()


def test_a_file_may_be_hotter_than_most(tmp_path):
    assert sampling_defaults("auto", written(tmp_path, temperature=2.5)).temperature == 2.5


@pytest.mark.parametrize(
    "fields",
    [{"temperature": "hot"}, {"top_p": 2}, {"top_k": -2}, {"top_k": float("inf")},
     {"temperature": True}, {"max_new_tokens": 0}, {"temperature": float("nan")}],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, fields):
    with pytest.raises(ValueError, match=next(iter(fields))) as error:
        sampling_defaults("auto", written(tmp_path, **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "[" * 10**5, "\xff"])
def test_a_file_that_cannot_be_read(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        sampling_defaults("auto", tmp_path)
    with pytest.raises(ValueError, match="--generation-config"):
        sampling_defaults("/nowhere", tmp_path)
