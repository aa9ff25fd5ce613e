"""Tiny tokenizers of every family, trained in a moment on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from memory_efficient_gpt.tokenizer import Tokenizer

CORPUS = [
    "The old house stood on the hill, and the wind was in the trees.",
    "It was the best of times; it was the worst of times.",
    "def add(a, b):\n    return a + b\n\n# <div>not html</div>\n",
    "naïve café, Straße, 東京の空 😀👍🏽",
] * 4
CONTROL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "{{ '<|' + m.role + '|>' }}"
    "{% if m.content is string %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<|end|>{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = ["byte_level", "sentencepiece", "sentencepiece_first", "unigram", "wordpiece", "word_suffix"]


@cache
def tokenizer(family: str) -> Tokenizer:
    """The family's tokenizer, wrapped."""
    return Tokenizer(transformers_tokenizer(family))


def transformers_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer as transformers has it, with control tokens and a chat template."""
    backend: Backend = globals()[f"_{family}"]()
    if family != "byte_level":
        backend.add_special_tokens(CONTROL)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _sentencepiece() -> Backend:
    """As Llama 2 has it: byte fallback, a space put before every piece of text, <s> before the whole."""
    backend = _bpe_with_byte_fallback()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def _sentencepiece_first() -> Backend:
    """As Mistral has it: a space put before the first piece of text only."""
    backend = _bpe_with_byte_fallback()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def _bpe_with_byte_fallback() -> Backend:
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    frame = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=frame, limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    model = models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)]
    )
    return backend


def _unigram() -> Backend:
    """Its model knows the control tokens' names as pieces and would take them whole."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", *CONTROL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _word_suffix() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend
