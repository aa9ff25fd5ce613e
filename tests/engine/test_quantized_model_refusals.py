"""What the library's announced API refuses, and that nothing is changed then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.api import LLM
from memory_efficient_gpt.attention import use_flash_attention_if_available
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import (
    ConfigError,
    InvalidRequestError,
    MegptError,
    ModelNotFoundError,
)
from memory_efficient_gpt.kv_cache import use_paged_kv_cache_if_available
from memory_efficient_gpt.loading import load_config, load_model, resolve_model
from memory_efficient_gpt.memory import estimate
from memory_efficient_gpt.quantization import QuantizedModel
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from tests.engine.architectures.configs import CASES

PROMPTS = ["Hello, I am a language model.", "It was a dark night when", "“Who is there?” cried the old"]
IDS = torch.arange(4, 32).view(2, 14)
POOL: dict[str, Any] = dict(num_kv_blocks=200, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits must be 4, 8 or 16 \(not quantized\), got 3"),
        ({"bits": True}, "bits must be 4, 8 or 16"),
        ({"bits": [4]}, r"bits must be 4, 8 or 16 \(not quantized\), got \[4\]"),
        ({"scheme": 4}, "scheme must be the name of a scheme, such as 'int4-g128', got 4"),
        ({"rules": {"*.down_proj": 8}}, r"rules\['\*.down_proj'\] must be the name of a scheme, .*got 8"),
        ({"rules": ["*.down_proj=int8"]}, r"rules must map patterns .*got \['\*.down_proj=int8'\]"),
        ({"rules": {4: "int8"}}, "rules must map patterns"),
        ({"rounding": ["up"]}, "rounding .* is unknown"),
        (
            {"bits": 4, "rounding": "hqq"},
            "hqq finds zero points, and int4 has none. Use search",
        ),
        ({"rounding": "hqq"}, "hqq finds zero points, and int4 has none"),
        (
            {"bits": 16, "rounding": "nearest"},
            "rounding 'nearest' is for weights that are quantized",
        ),
        ({"bits": 4, "scheme": "int8"}, "bits 4 and scheme 'int8' both"),
        ({"scheme": "int5"}, "'int5' is unknown"),
        ({"rounding": "up"}, "rounding 'up' is unknown"),
        ({"rounding": "gptq"}, "runs the model on a text: `megpt quantize MODEL --rounding gptq"),
        ({"rules": {"*.down_proj": "int5"}}, r"rules\['\*.down_proj'\]: .*'int5' is unknown"),
        ({"rules": {"*.nothing": "int8"}}, r"'\*.nothing' matches no layer"),
        ({"kv_blocks": 4}, "'kv_blocks' is no option of a QuantizedModel. Options .*num_kv_blocks"),
        (
            {"quantization": "int4"},
            r"'quantization' is no option of a QuantizedModel\. Say bits=4, or scheme=",
        ),
        ({"bits_per_weight": 4.8}, "'bits_per_weight' is no option .*megpt quantize MODEL --bits-per-weight"),
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
    with pytest.raises(ConfigError, match="is quantized already, so that rounding 'hqq' has nothing"):
        QuantizedModel.from_pretrained(tmp_path / "int8", bits=8, rounding="hqq", **POOL)
    with pytest.raises(ConfigError, match="is not empty"):
        QuantizedModel.from_pretrained(tmp_path / "int8", **POOL).save_pretrained(tmp_path / "int8")


def test_a_mix_is_not_taken_for_one_of_its_schemes(tmp_path: Path) -> None:
    rules = {"*.down_proj": "int8"}
    mixed = QuantizedModel.from_pretrained("demo-draft", bits=4, rules=rules, **POOL)
    assert ", mixed (int4, int8), " in repr(mixed)
    mixed.save_pretrained(tmp_path / "mixed")
    assert (
        QuantizedModel.from_pretrained(tmp_path / "mixed", **POOL).info.quantization == "mixed (int4, int8)"
    )
    for options in ({"scheme": "int4"}, {"bits": 4}):
        with pytest.raises(ConfigError, match=r"already, as mixed \(int4, int8\); int4 was asked for"):
            QuantizedModel.from_pretrained(tmp_path / "mixed", **options, **POOL)
    with pytest.raises(ConfigError, match=r"already, as mixed \(int4, int8\); int4 was asked for"):
        LLM(tmp_path / "mixed", quantization="int4", num_kv_blocks=20, progress=False)
    with pytest.raises(ConfigError, match=r"already, as mixed \(int4, int8\); int4 was asked for"):
        estimate(EngineConfig(model=str(tmp_path / "mixed"), quantization="int4", num_kv_blocks=20))
    found = estimate(EngineConfig(model=str(tmp_path / "mixed"), num_kv_blocks=20))
    assert found.quantization == "mixed (int4, int8)"


def test_several_schemes_of_as_many_bits_are_those_bits(tmp_path: Path) -> None:
    rules = {"*.down_proj": "int4-g128"}
    QuantizedModel.from_pretrained("demo-draft", bits=4, rules=rules, **POOL).save_pretrained(
        tmp_path / "mixed"
    )
    model = QuantizedModel.from_pretrained(tmp_path / "mixed", bits=4, **POOL)
    assert model.info.quantization == "mixed (int4, int4-g128)"


def test_a_folder_of_which_nothing_is_quantized_is_an_ordinary_one(tmp_path: Path) -> None:
    config = load_config(resolve_model("demo-draft"))
    model = load_model(resolve_model("demo-draft"), config, dtype=torch.bfloat16, device=torch.device("cpu"))
    save_quantized(model, tmp_path / "plain", source=resolve_model("demo-draft"))
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert QuantizedModel.from_pretrained(tmp_path / "plain", **POOL).info.quantization == "int4"
    assert estimate(EngineConfig(model=str(tmp_path / "plain"), quantization="int8")).quantization == "int8"


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
