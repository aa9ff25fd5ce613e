"""What the library's announced API refuses, and that nothing is changed then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention import use_flash_attention_if_available
from memory_efficient_gpt.errors import (
    ConfigError,
    InvalidRequestError,
    MegptError,
    ModelNotFoundError,
)
from memory_efficient_gpt.kv_cache import use_paged_kv_cache_if_available
from memory_efficient_gpt.quantization import QuantizedModel
from tests.engine.architectures.configs import CASES

PROMPTS = ["Hello, I am a language model.", "It was a dark night when", "“Who is there?” cried the old"]
IDS = torch.arange(4, 32).view(2, 14)
POOL: dict[str, Any] = dict(num_kv_blocks=200, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits must be 4, 8 or 16 \(not quantized\), got 3"),
        ({"bits": True}, "bits must be 4, 8 or 16"),
        ({"bits": 4, "scheme": "int8"}, "bits 4 and scheme 'int8' both"),
        ({"scheme": "int5"}, "'int5' is unknown"),
        ({"rounding": "up"}, "rounding 'up' is unknown"),
        ({"rules": {"*.down_proj": "int5"}}, r"rules\['\*.down_proj'\]: .*'int5' is unknown"),
        ({"rules": {"*.nothing": "int8"}}, r"'\*.nothing' matches no layer"),
        ({"kv_blocks": 4}, "'kv_blocks' is no option of a QuantizedModel. Options .*num_kv_blocks"),
        ({"quantization": "int4"}, "'quantization' is no option"),
        ({"dtype": "float8"}, "dtype must be auto, float32, bfloat16, float16, got 'float8'"),
        ({"max_model_len": 9999}, "max_model_len is 9,999; this model's limit is 2,048"),
    ],
)
def test_wrong_settings_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizedModel.from_pretrained("demo", progress=False, **options)


def test_without_a_tokenizer_ids_work_and_text_is_refused() -> None:
    model = QuantizedModel.from_model(CASES["llama"].model(), num_kv_blocks=64)
    assert model.tokenizer is None
    for _ in range(2):
        assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 18)
        with pytest.raises(InvalidRequestError, match="has no tokenizer, so it takes token ids only"):
            model.generate("text", max_new_tokens=4)
        with pytest.raises(InvalidRequestError, match="has no tokenizer"):
            model.generate(IDS, max_new_tokens=4, stop_strings="end")
        use_paged_kv_cache_if_available(model)


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    QuantizedModel.from_pretrained("demo-draft", bits=8, **POOL).save_pretrained(tmp_path / "int8")
    with pytest.raises(ConfigError, match="is quantized already, as int8; int4 was asked for"):
        QuantizedModel.from_pretrained(tmp_path / "int8", bits=4, **POOL)
    with pytest.raises(ConfigError, match="is quantized already, as int8; other rules was asked for"):
        QuantizedModel.from_pretrained(tmp_path / "int8", rules={"*": "int4"}, **POOL)
    with pytest.raises(ConfigError, match="is not empty"):
        QuantizedModel.from_pretrained(tmp_path / "int8", **POOL).save_pretrained(tmp_path / "int8")


def test_no_model_at_all_is_refused() -> None:
    wrong: Any = torch.nn.Linear(2, 2)
    for function in (
        use_flash_attention_if_available, use_paged_kv_cache_if_available, QuantizedModel.from_model
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="got Linear"):
            function(wrong)
    with pytest.raises(ModelNotFoundError, match="nope"):
        QuantizedModel.from_pretrained("./nope")


def test_a_kv_cache_that_cannot_be_leaves_the_model_as_it_was() -> None:
    model = QuantizedModel.from_pretrained("demo", kv_cache_dtype="float16", progress=False)
    with pytest.raises(MegptError, match="float16 is for CUDA"):
        use_paged_kv_cache_if_available(model)
    assert model.model.config._attn_implementation == "sdpa"
    assert model.generate(PROMPTS[0], max_new_tokens=3)
