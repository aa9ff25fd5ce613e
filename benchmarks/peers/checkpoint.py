"""One random model in two formats: a Hugging Face folder and a GGUF file with the same bf16 weights.

Purpose: let every peer run the same matrices without downloading any.
Does not know: who reads them.
Invariant: a folder that exists is whole: it is written under another name and renamed.

Speed depends on shapes and not on values, so the weights are normal random numbers. There is no
tokenizer: the benchmarks speak token ids.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama model with untied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_positions: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


SHAPES = {
    "tinyllama": LlamaShape(
        hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, vocab=32_000
    ),  # TinyLlama-1.1B's
    "toy": LlamaShape(hidden=256, intermediate=512, layers=3, heads=8, kv_heads=2, vocab=1024),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the two forms of one model are, and how many bytes of weights a token reads."""

    folder: Path
    gguf: Path
    bytes_per_token: int


def ensure_checkpoint(shape_name: str, cache: Path) -> Checkpoint:
    """Write the model into `cache` unless it is there (2.2 GB twice for tinyllama, about a minute).

    The GGUF file is written only where the `gguf` package is installed.
    """
    shape = SHAPES[shape_name]
    target = cache / shape_name
    if not (target / "config.json").is_file():
        scratch = cache / f"{shape_name}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        tensors = dict(random_tensors(shape))
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n")
        write_gguf_if_possible(shape, tensors, scratch / "model.gguf")
        scratch.rename(target)
    return Checkpoint(target, target / "model.gguf", bytes_per_token(shape))


def hf_config(shape: LlamaShape) -> dict[str, object]:
    """The model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def random_tensors(shape: LlamaShape, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under its Hugging Face name, bf16, in the order of the forward pass."""
    generator = torch.Generator().manual_seed(seed)
    kv = shape.kv_heads * shape.head_dim

    def normal(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * INITIAL_STD).bfloat16()

    yield "model.embed_tokens.weight", normal(shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
        yield f"{prefix}.self_attn.q_proj.weight", normal(shape.hidden, shape.hidden)
        yield f"{prefix}.self_attn.k_proj.weight", normal(kv, shape.hidden)
        yield f"{prefix}.self_attn.v_proj.weight", normal(kv, shape.hidden)
        yield f"{prefix}.self_attn.o_proj.weight", normal(shape.hidden, shape.hidden)
        yield f"{prefix}.post_attention_layernorm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
        yield f"{prefix}.mlp.gate_proj.weight", normal(shape.intermediate, shape.hidden)
        yield f"{prefix}.mlp.up_proj.weight", normal(shape.intermediate, shape.hidden)
        yield f"{prefix}.mlp.down_proj.weight", normal(shape.hidden, shape.intermediate)
    yield "model.norm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", normal(shape.vocab, shape.hidden)


def bytes_per_token(shape: LlamaShape) -> int:
    """Bytes of bf16 matrices that computing one token reads (the input embedding is looked up)."""
    attention = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * shape.head_dim)
    return 2 * (
        shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + shape.vocab * shape.hidden
    )


def write_gguf_if_possible(shape: LlamaShape, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the GGUF form; without the `gguf` package there is none, and the llama.cpp peer says so."""
    try:
        from benchmarks.peers.gguf_export import write_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        return
    write_gguf(shape, tensors, path)


def main() -> None:
    """Write a checkpoint by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    options = parser.parse_args()
    checkpoint = ensure_checkpoint(options.shape, options.cache)
    print(f"{checkpoint.folder}: {checkpoint.bytes_per_token / 1e9:.2f} GB of weights per token")


if __name__ == "__main__":
    main()
