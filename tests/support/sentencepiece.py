"""A real sentencepiece-like tokenizer (metaspace, byte fallback, BOS), small enough for a test."""

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

_SPECIALS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
_WORDS = ["▁the", "▁cat", "▁", "s", "t", "h", "e", "c", "a", "é", "€", "the", "cat"]
BOS, EOS = 1, 2
THE, CAT = len(_SPECIALS), len(_SPECIALS) + 1
NUM_BYTES_FROM = len(_SPECIALS) + len(_WORDS)
"""The token of byte `b` is this many from the first."""


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    words = [*_SPECIALS, *_WORDS, *(f"<0x{b:02X}>" for b in range(256))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    words += ["th", "ca"]
    backend = Tokenizer(
        models.BPE(
            vocab={w: k for k, w in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(_SPECIALS)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
