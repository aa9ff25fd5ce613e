"""Tiny random architectures: every family that is claimed to work, and those that must be refused.

Each is real in its kind (grouped heads, windows shorter than the prompts, mixtures of experts, latent
attention, soft caps, sinks), and small enough to build and run in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
WINDOW = 8


@dataclass(frozen=True)
class Case:
    """One architecture: transformers' `model_type`, its settings, and the tier that it must get."""

    name: str
    model_type: str
    settings: dict[str, Any]
    tier: str = "B"

    def config(self) -> PreTrainedConfig:
        """A fresh config."""
        return AutoConfig.for_model(self.model_type, **self.settings)

    def model(self, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
        """A float32 model with weights from `randomize`; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
            model = from_config(self.config(), attn_implementation=attention, dtype=torch.float32)
            randomize(model)
        model.train(False)
        return model


def randomize(model: torch.nn.Module) -> None:
    """Weights that make greedy generation decisive and dependent on the whole context.

    Matrices have a variance of 1 / inputs (transformers' own 0.02 would give nearly uniform attention, where
    a wrong mask hardly shows), vectors some noise. Logits then have a standard deviation of about 1, and the
    best of 128 leads by 0.3 on average. Rounding is some 1e-6, so a tie that it could break has a chance of
    about 3e-6 a token, and the seeds are fixed.
    """
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=min(parameter.shape[-2:]) ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _case(name: str, model_type: str = "", /, tier: str = "B", **settings: Any) -> Case:
    common = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Case(name, model_type or name, common | settings, tier)


def _llama_like(name: str, model_type: str = "", /, tier: str = "B", **settings: Any) -> Case:
    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return _case(name, model_type, tier, **(common | settings))


_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]

PACKED = (
    _case("gpt2", **_GPT2),
    _case("gpt_bigcode", **_GPT2),
    _case("gpt_bigcode_mha", "gpt_bigcode", multi_query=False, **_GPT2),
    _llama_like("gpt_neox"),
    _case("opt", hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
          max_position_embeddings=256, word_embed_proj_dim=64),
    _case("opt_projected", "opt", hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
          word_embed_proj_dim=32, max_position_embeddings=256, do_layer_norm_before=False),
    _llama_like("biogpt"),
    _llama_like("llama"),
    _llama_like("llama_mha", "llama", num_key_value_heads=4),
    _llama_like("llama_mqa", "llama", num_key_value_heads=1),
    _llama_like("llama_bias_tied", "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    _llama_like("llama3_rope", "llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    _llama_like("llama_dynamic_rope", "llama", rope_parameters={
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    _llama_like("llama_yarn_rope", "llama", rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}),
    _llama_like("mistral", sliding_window=WINDOW),
    _llama_like("mistral_full", "mistral", sliding_window=None),
    _llama_like("ministral", sliding_window=WINDOW, head_dim=16, layer_types=_SLIDING_THEN_FULL),
    _llama_like("qwen2"),
    _llama_like("qwen2_window", "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    _llama_like("qwen3", head_dim=24),
    _llama_like("gemma", head_dim=16),
    _llama_like("gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW),
    _llama_like("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
                layer_types=_SLIDING_THEN_FULL),
    _llama_like("gemma3n_text", head_dim=16, sliding_window=WINDOW, num_hidden_layers=4,
                num_kv_shared_layers=2, layer_types=_SLIDING_THEN_FULL * 2, intermediate_size=[96] * 4,
                hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB_SIZE, laurel_rank=8,
                altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4),
    _llama_like("gemma4_text", head_dim=16, global_head_dim=32, sliding_window=WINDOW, num_hidden_layers=4,
                num_kv_shared_layers=2, layer_types=_SLIDING_THEN_FULL * 2, hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=VOCAB_SIZE),
    _llama_like("phi", num_key_value_heads=4),
    _llama_like("phi3"),
    _llama_like("phi3_window", "phi3", sliding_window=WINDOW),
    _llama_like("phi3_longrope", "phi3", original_max_position_embeddings=128, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 8, "short_factor": [1.1] * 8,
        "original_max_position_embeddings": 128}),
    _llama_like("phimoe", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    _llama_like("phimoe_window", "phimoe", num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    _llama_like("cohere"),
    _llama_like("cohere2", sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL),
    _llama_like("olmo"),
    _llama_like("olmo2"),
    _llama_like("olmo3", sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL),
    _llama_like("olmoe", num_experts=4, num_experts_per_tok=2),
    _llama_like("stablelm"),
    _llama_like("starcoder2"),
    _llama_like("starcoder2_window", "starcoder2", sliding_window=WINDOW),
    _llama_like("mixtral", num_local_experts=4, num_experts_per_tok=2),
    _llama_like("qwen2_moe", shared_expert_intermediate_size=32, **_EXPERTS),
    _llama_like("qwen3_moe", head_dim=16, **_EXPERTS),
    _llama_like("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW,
                layer_types=_SLIDING_THEN_FULL, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    _llama_like("deepseek_v2", **_LATENT),
    _llama_like("deepseek_v3", **_LATENT),
    _llama_like("granite", attention_multiplier=0.2, logits_scaling=2.0, residual_multiplier=0.5),
    _llama_like("granitemoe", num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.2),
    _llama_like("glm", head_dim=16),
    _llama_like("glm4", head_dim=16),
    _llama_like("glm4_moe", head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                first_k_dense_replace=1, n_group=1, topk_group=1),
    _llama_like("dots1", head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1, sliding_window=None),
    _llama_like("ernie4_5_moe", head_dim=16, moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                moe_layer_start_index=1),
    _case("ctrl", n_embd=64, n_layer=2, n_head=4, dff=96, n_positions=256),
    _llama_like("smollm3", num_hidden_layers=4),
    _llama_like("nemotron", head_dim=16),
    _llama_like("persimmon", num_key_value_heads=4),
    _llama_like("exaone4", sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL),
    _llama_like("ernie4_5", head_dim=16),
    _llama_like("helium", head_dim=16),
    _llama_like("arcee"),
    _llama_like("apertus"),
    _llama_like("seed_oss", head_dim=16),
    _llama_like("minimax_m2", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    _llama_like("hunyuan_v1_dense", head_dim=16),
    _llama_like("bert_decoder", "bert", is_decoder=True),
)  # fmt: skip

UNPACKED = (
    _llama_like("gpt_neox_japanese", tier="C"),
    _case("bloom", tier="C", hidden_size=64, n_layer=2, n_head=4),
    _llama_like("falcon", tier="C", new_decoder_architecture=False, multi_query=True),
    _llama_like("falcon_alibi", "falcon", tier="C", alibi=True, new_decoder_architecture=False),
    _case("gptj", tier="C", rotary_dim=8, **_GPT2),
    _case("codegen", tier="C", rotary_dim=8, **_GPT2),
    _case("mpt", tier="C", d_model=64, n_layers=2, n_heads=4, max_seq_len=256),
    _case("xglm", tier="C", d_model=64, ffn_dim=96, num_layers=2, attention_heads=4,
          max_position_embeddings=256),
    _case("gpt_neo", tier="C", hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96,
          attention_types=[[["global", "local"], 1]], window_size=WINDOW, max_position_embeddings=256),
    _case("mamba", tier="C", hidden_size=64, num_hidden_layers=2, state_size=8),
    _llama_like("jamba", tier="C", num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
                attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
                mamba_d_state=8),
    _llama_like("falcon_h1", tier="C", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
                mamba_chunk_size=8),
    _llama_like("lfm2", tier="C", layer_types=["conv", "full_attention"]),
    _llama_like("qwen3_next", tier="C", head_dim=16, layer_types=["linear_attention", "full_attention"],
                linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
                linear_value_head_dim=16, shared_expert_intermediate_size=32, **_EXPERTS),
    _llama_like("diffllama", tier="C"),
    _llama_like("llama4_text", tier="C", head_dim=16, intermediate_size_mlp=96, num_local_experts=2,
                attention_chunk_size=WINDOW, floor_scale=8, num_hidden_layers=4),
)  # fmt: skip

CASES = {case.name: case for case in (*PACKED, *UNPACKED)}
