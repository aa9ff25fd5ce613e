"""The bundled model folders: complete, small, loadable, with one lossless tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import training.chat as chat

BUNDLED = Path(__file__).parents[2] / "engine" / "memory_efficient_gpt" / "bundled"
LIMITS_BYTES = {"demo": 11e6, "demo-mha": 5e6, "demo-draft": 2e6}
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXTS = (
    "It was the best of times, it was the worst of times.\n\nChapter II",
    "  leading, trailing and \t mixed   \n\n \n space \r\n ",
    "don't do n't can't 12,345.67 -- naïve café",
    "日本語 русский العربية 😀👩‍👩‍👧 \x00\x01\ufeff \u2028",
    "",
)


@pytest.mark.parametrize("name", LIMITS_BYTES)
def test_folder_is_complete_and_small(name: str) -> None:
    files = {path.name: path.stat().st_size for path in (BUNDLED / name).iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= LIMITS_BYTES[name]


@pytest.mark.parametrize("name", LIMITS_BYTES)
def test_model_loads_in_bf16_and_writes_english(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / name)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    inputs = tokenizer("She looked out of the", return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].float().softmax(-1)
    window = tokenizer(" window").input_ids
    assert len(window) == 1
    assert probabilities[window[0]] > 0.1


def test_config_is_what_the_engine_counts_on() -> None:
    demo = AutoConfig.from_pretrained(BUNDLED / "demo")
    draft = AutoConfig.from_pretrained(BUNDLED / "demo-draft")
    assert (demo.model_type, draft.model_type) == ("llama", "llama")
    assert demo.num_key_value_heads < demo.num_attention_heads
    assert demo.max_position_embeddings == draft.max_position_embeddings == 2048
    assert demo.head_dim % 16 == 0
    assert AutoConfig.from_pretrained(BUNDLED / "demo-mha").model_type == "gpt2"


def test_one_tokenizer_for_all() -> None:
    contents = {(BUNDLED / name / "tokenizer.json").read_bytes() for name in LIMITS_BYTES}
    assert len(contents) == 1
    tokenizer = Tokenizer.from_str(contents.pop().decode())
    assert tokenizer.get_vocab_size() == 4096
    ids = [tokenizer.token_to_id(token) for token in chat.SPECIAL_TOKENS]
    assert ids == list(range(len(chat.SPECIAL_TOKENS)))


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_is_lossless(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "demo")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_renders_the_trained_format() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "demo")
    messages: Any = [
        {"role": "system", "content": "A door opened."},
        {"role": "user", "content": " Who is there? "},
        {"role": "assistant", "content": "A friend."},
        {"role": "user", "content": [{"type": "text", "text": "Come in."}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>A door opened.<|end|><|user|>Who is there?<|end|>"
        "<|assistant|>A friend.<|end|><|user|>Come in.<|end|><|assistant|>"
    )
    assert not str(tokenizer.apply_chat_template(messages, tokenize=False)).endswith("<|assistant|>")


def test_generation_stops_at_both_ends() -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "demo")
    assert model.generation_config.eos_token_id == [0, chat.SPECIAL_TOKENS.index(chat.END)]
    assert model.generation_config.pad_token_id == 1
