"""What is chosen for the user is said, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from memory_efficient_gpt.assembly import Parts, _fuse_on_cuda, build
from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError, UnsupportedModelError
from memory_efficient_gpt.fusion.merged_linear import MergedLinear
from memory_efficient_gpt.tiers import decide_tier

SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=3,
)  # fmt: skip


def assemble_tiny(model: Any = None, **options: Any) -> Parts:
    model = model or LlamaForCausalLM(LlamaConfig(**SHAPE))
    config = EngineConfig(model="tiny", **options)
    return build(model, decide_tier(model.config), config, device=torch.device("cpu"), name="tiny")


def test_info_counts_bytes_of_weights_and_cache() -> None:
    parts = assemble_tiny(num_kv_blocks=10, block_size=8)
    weights = sum(p.numel() * 4 for p in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
    assert parts.info.weights_bytes == weights
    per_token = 2 * 2 * (8 + 8) * 4  # layers x kv heads x (key + value) x float32
    assert parts.info.kv_cache_bytes == 11 * 8 * per_token  # the trash block is paid for too
    assert parts.info.num_kv_blocks == 10 and parts.info.eos_token_ids == (3,)


def test_int8_cache_counts_its_scales_and_is_a_quarter_and_a_bit() -> None:
    plain = assemble_tiny(num_kv_blocks=10).info
    small = assemble_tiny(num_kv_blocks=10, kv_cache_dtype="int8").info
    assert small.kv_cache_dtype == "int8"
    assert small.kv_cache_bytes * 8 == plain.kv_cache_bytes * 3  # (8 int8 + one float32 scale) / 8 float32


def test_context_longer_than_the_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 500; this model's limit is 128"):
        assemble_tiny(max_model_len=500)


def test_small_pool_limits_the_context_and_says_so() -> None:
    parts = assemble_tiny(num_kv_blocks=4, block_size=8)
    assert parts.info.max_model_len == 32
    assert any("context limited to 32 tokens" in note for note in parts.info.notes)


def test_pool_in_bytes_is_kept_to() -> None:
    info = assemble_tiny(kv_cache_bytes=100_000).info
    assert 90_000 < info.kv_cache_bytes <= 100_000
    with pytest.raises(ConfigError, match="kv_cache_bytes is 10; two blocks take"):
        assemble_tiny(kv_cache_bytes=10)


def test_a_window_in_every_layer_lets_old_blocks_go() -> None:
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16))
    assert assemble_tiny(mistral).scheduler_config.window == 16
    assert assemble_tiny().scheduler_config.window is None


def test_fallback_to_torch_attention_is_explained() -> None:
    info = assemble_tiny(native_kernels=False).info
    assert info.attention_backend == "torch"
    assert any("native kernels are switched off" in note for note in info.notes)


def test_where_texts_may_depend_on_the_batch_is_said() -> None:
    def bfloat16() -> Any:
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()

    promised = "a seed's text may depend on what else is in the batch"
    assert any(promised in note for note in assemble_tiny(bfloat16(), native_kernels=False).info.notes)
    native = assemble_tiny(bfloat16()).info
    assert (native.attention_backend == "cpu-native") == (not any(promised in n for n in native.notes))


def test_a_float16_cache_on_a_cpu_is_refused_with_what_to_use() -> None:
    for dtype in ("float16", "fp8"):
        with pytest.raises(ConfigError, match=f"{dtype} is for CUDA; on a CPU use auto, bfloat16"):
            assemble_tiny(kv_cache_dtype=dtype)


def test_float16_on_a_cpu_is_computed_in_bfloat16(tmp_path: Any) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).half().save_pretrained(tmp_path)
    info = Engine.load(EngineConfig(model=str(tmp_path), num_kv_blocks=8)).info
    assert info.dtype == "bfloat16"
    assert any("float16 weights" in note for note in info.notes)


def test_a_forced_tier_is_obeyed_or_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert Engine.from_model(model, EngineConfig(model="tiny", tier="C")).info.tier == "C"
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedModelError, match="tier B was asked for"):
        Engine.from_model(bloom, EngineConfig(model="tiny", tier="B"))


def test_layers_of_one_input_are_merged_before_others_are_fused_and_both_are_noted() -> None:
    """As for a CUDA device; here the CPU's kernels stand for Triton's."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    decision = decide_tier(model.config)
    assert decision.layers is not None
    prepare_model(model)
    merged, fused = _fuse_on_cuda(model, decision.layers, torch.device("cpu"), deterministic=False)
    assert merged == "10 linear layers merged into 4 products"
    assert "kernels" in fused and "merged" not in fused
    assert sum(isinstance(module, MergedLinear) for module in model.modules()) == 10
