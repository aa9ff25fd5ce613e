"""What operators may write into `variants`."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt_server.model_settings import ModelSettings
from memory_efficient_gpt_server.settings import load_settings


def model_with(variants: Any, **fields: Any) -> ModelSettings:
    models = [{"model": "demo", "variants": variants, **fields}]
    (model,) = load_settings({"models": models, "memory_budget_bytes": 10**9}, {}).settings.served_models()
    return model


def test_variants_are_schemes_mappings_or_any() -> None:
    listed = model_with(
        ["INT4", "none", {"quantization": "int8", "kv_cache_dtype": "int8"}], quantization="int8"
    ).variants
    assert [(v.quantization, v.kv_cache_dtype) for v in listed if not isinstance(v, str)] == [
        ("int4", "auto"), ("bf16", "auto"), ("int8", "int8"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"variants lists bf16, but without quantization .*out\.$"):
        model_with(["bf16"])
    assert model_with("any").variants == "any" and model_with([]).variants == ()
    assert ModelSettings(model="demo").variants == (), "clients choose nothing unless the operator says so"


@pytest.mark.parametrize(
    ("variants", "said"),
    [("int4", "must be any, or a list"), (["int5"], "scheme 'int5' is unknown"), ([7], "has 7; each must be"),
     ([{}], "each must be a scheme"), ([{"attention": "flash"}], "each must be a scheme"),
     ([{"kv_cache_dtype": "int3"}], "use auto, float32"), ([{"kv_cache_dtype": "auto"}], "says nothing"),
     ([{"quantization": 4}], "must be the name of a scheme"), (["int4", "INT4"], "one variant twice")],
)  # fmt: skip
def test_what_makes_no_sense_is_told(variants: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        model_with(variants)
    assert "models.0.variants" in str(caught.value)
