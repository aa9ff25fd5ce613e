"""A Llama checkpoint as a GGUF file in bf16, without a vocabulary.

Purpose: the file that the llama.cpp peer reads.
Does not know: where the tensors come from.
Invariant: the same numbers as the Hugging Face form, Q and K reordered for llama.cpp's rotary layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

if TYPE_CHECKING:
    from benchmarks.peers.checkpoint import LlamaShape

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(shape: LlamaShape, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write `tensors` (Hugging Face names, bf16) to `path`."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("random")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors.items():
        add_tensor(writer, shape, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: GGUFWriter, shape: LlamaShape, name: str, tensor: torch.Tensor) -> None:
    """Queue one tensor: vectors in float32, as llama.cpp keeps norms, matrices in bf16."""
    if tensor.ndim == 1:
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
        return
    if name.endswith("q_proj.weight"):
        tensor = interleave_halves(tensor, shape.heads)
    elif name.endswith("k_proj.weight"):
        tensor = interleave_halves(tensor, shape.kv_heads)
    # numpy has no bf16: its bits go as bytes, two for each number.
    raw = tensor.contiguous().view(torch.uint8).numpy().astype(np.uint8, copy=False)
    writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)


def interleave_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder each head's rows [first half, second half] to [0, half, 1, half + 1, ...].

    Hugging Face rotates row i with row i + head_dim / 2; llama.cpp's Llama rotates neighbours.
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face parameter."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"
