"""Exact KV geometry from a config alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, T5Config

from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache.geometry import LayerKV, call_window, probe_geometry, token_bytes
from tests.engine.architectures.configs import CASES, WINDOW

# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def config_8b(**settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        **settings,
    )


def test_every_layer_of_an_8b_model_in_about_a_second_and_without_weights() -> None:
    probe_geometry(CASES["llama"].config())  # imports are not the probe's time
    started = time.perf_counter()
    layers = probe_geometry(config_8b())
    assert time.perf_counter() - started < 2  # 0.1 s on an idle core
    assert layers == [
        LayerKV(f"model.layers.{index}.self_attn", 8, 128, 128, num_query_heads=32) for index in range(32)
    ]
    assert token_bytes(layers, element_bytes=2) == 32 * 8 * (128 + 128) * 2
    assert token_bytes(layers, element_bytes=1, scale_bytes=4) == 32 * 8 * (128 + 128 + 2 * 4)


def test_windows_soft_caps_and_sinks_are_recorded_by_layer() -> None:
    gemma2 = probe_geometry(CASES["gemma2"].config())
    assert [layer.window for layer in gemma2] == [WINDOW, None]
    assert [layer.softcap for layer in gemma2] == [50.0, 50.0]
    gpt_oss = probe_geometry(CASES["gpt_oss"].config())
    assert [(layer.window, layer.sinks) for layer in gpt_oss] == [(WINDOW, True), (None, True)]


def test_keys_and_values_may_differ_in_size() -> None:
    layers = probe_geometry(CASES["deepseek_v3"].config())
    assert {(layer.key_dim, layer.value_dim, layer.num_kv_heads) for layer in layers} == {(24, 16, 4)}


def test_one_kv_head_for_all() -> None:
    layers = probe_geometry(CASES["gpt_bigcode"].config())
    assert {(layer.num_query_heads, layer.num_kv_heads) for layer in layers} == {(4, 1)}


def test_quantized_checkpoints_config_is_read_too() -> None:
    config = config_8b(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert len(probe_geometry(config)) == 32
    assert config.quantization_config["load_in_4bit"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CASES["bloom"].config(), "never calls"),
        (CASES["falcon"].config(), "table of its own"),
        (CASES["diffllama"].config(), "attends twice in one pass in model.layers.0.self_attn"),
        (T5Config(), "encoder-decoder"),
        (AutoConfig.for_model("bert"), "attends to later tokens"),
        (AutoConfig.for_model("clip"), "no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_cannot_be_paged_are_refused_with_the_reason(
    config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        probe_geometry(config)


class Attention(torch.nn.Module):
    """Stands for a model's attention module."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_window_comes_from_the_call_then_the_module_then_the_config() -> None:
    types = ["sliding_attention", "full_attention"]
    config = SimpleNamespace(sliding_window=9, layer_types=types)
    everything = Attention(sliding_window=7, config=config, layer_idx=0)
    assert call_window(everything, {"sliding_window": 5}) == 5
    assert call_window(everything, {"sliding_window": None}) is None
    assert call_window(everything, {}) == 7
    assert call_window(Attention(config=config, layer_idx=0), {}) == 9
    assert call_window(Attention(config=config, layer_idx=1), {}) is None
    assert call_window(Attention(config=SimpleNamespace(sliding_window=9)), {}) == 9
    switched_off = SimpleNamespace(sliding_window=9, use_sliding_window=False)
    assert call_window(Attention(config=switched_off), {}) is None
    assert call_window(Attention(), {}) is None
