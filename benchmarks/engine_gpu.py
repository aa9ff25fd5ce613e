"""A whole 8B-shaped model on a GPU: how long it takes to load and quantize, its bytes, how fast it decodes.

Purpose: seconds from files to a ready engine, bytes, milliseconds a step, for several ways to store weights.
Does not know: kernels, peers.
Invariant: weights are random, their files in the page cache; a step's time is that of the whole engine.

    python -m benchmarks.engine_gpu --out engine.json            needs a CUDA device; two to three minutes
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import accelerator_facts, versions
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192,
        tie_word_embeddings=False, rope_theta=500000.0,
    ),
    "llama1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, max_position_embeddings=8192,
        tie_word_embeddings=True, rope_theta=500000.0,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=1024, max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
PROMPT = 512
STEPS = 16


def write_model(folder: Path, shape: str, device: str) -> None:
    """A Llama with random bfloat16 weights, as safetensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(
                LlamaConfig(**SHAPES[shape], dtype="bfloat16", bos_token_id=1, eos_token_id=2)
            )
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="4GB")


def load(model: Path, device: str, **options: Any) -> tuple[Engine, float]:
    """An engine, and the seconds it took."""
    began = time.perf_counter()
    config = EngineConfig(
        model=str(model), device=device, max_model_len=2048, max_num_seqs=32, prefix_cache=False, **options
    )
    engine = Engine.load(config)
    _wait(device)
    return engine, time.perf_counter() - began


def decode_ms(engine: Engine, batch: int, vocabulary: int, device: str) -> float:
    """Milliseconds of one step with `batch` sequences, once all have their prompts behind them."""
    rng = random.Random(batch)
    for number in range(batch):
        prompt = tuple(rng.randrange(3, vocabulary) for _ in range(PROMPT))
        engine.submit(
            Request(
                id=f"{batch}-{number}", prompt_token_ids=prompt,
                params=SamplingParams(temperature=0.0, max_tokens=STEPS + 24, ignore_eos=True),
            )
        )  # fmt: skip
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.request_id for event in engine.step()}
    for _ in range(3):
        engine.step()
    _wait(device)
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    _wait(device)
    spent = (time.perf_counter() - began) / STEPS * 1000
    while engine.has_work:
        engine.step()
    return spent


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def describe(engine: Engine, seconds: float, shape: str, device: str) -> dict[str, Any]:
    """What one engine gives."""
    vocabulary = SHAPES[shape]["vocab_size"]
    facts: dict[str, Any] = {
        "seconds_to_ready": round(seconds, 2), "weights_bytes": engine.info.weights_bytes,
        "quantization": engine.info.quantization, "kv_cache_dtype": engine.info.kv_cache_dtype,
        "notes": list(engine.info.notes),
        "decode_ms": {str(b): round(decode_ms(engine, b, vocabulary, device), 2) for b in (1, 8, 32)},
    }  # fmt: skip
    if device != "cpu":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    return facts


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(shape: str, device: str, folder: Path, save: Any) -> dict[str, Any]:
    """Every way to store the weights; `save` is called after each."""
    results: dict[str, Any] = {}
    plain, saved = folder / "bf16", folder / "int4-g128"
    write_model(plain, shape, device)
    _free(device)
    cases: list[tuple[str, Path, dict[str, Any]]] = [
        ("first load (imports, compiles)", plain, {"quantization": "int4-g128"}),
        ("int4-g128 from bf16", plain, {"quantization": "int4-g128"}),
        ("int4-g128 saved", saved, {}),
        ("int8 from bf16, int8 KV", plain, {"quantization": "int8", "kv_cache_dtype": "int8"}),
        ("fp8-dynamic from bf16, fp8 KV", plain, {"quantization": "fp8-dynamic", "kv_cache_dtype": "fp8"}),
        ("bf16", plain, {}),
    ]
    if device == "cpu":
        cases = [case for case in cases if "fp8 KV" not in case[0]]
    for name, model, options in cases:
        if model is saved:
            quantize(plain, saved, device)
            _free(device)
        engine, seconds = load(
            model, device, kv_cache_bytes=6 << 30 if device != "cpu" else 1 << 24, **options
        )
        results[name] = describe(engine, seconds, shape, device)
        Console().print(name, results[name]["seconds_to_ready"], "s", results[name]["decode_ms"])
        engine.close()
        del engine
        _free(device)
        save(results)
    return results


def quantize(plain: Path, saved: Path, device: str) -> None:
    """Write the int4 variant, as `megpt quantize` does."""
    from memory_efficient_gpt.quantization import QuantizedModel

    model = QuantizedModel.from_pretrained(str(plain), scheme="int4-g128", device=device)
    model.save_pretrained(saved)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args()

    def save(results: dict[str, Any]) -> None:
        record = {"shape": arguments.shape, "versions": versions(), "commit": arguments.commit,
                  **accelerator_facts(arguments.device), "results": results}  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        measure(arguments.shape, arguments.device, Path(folder), save)


if __name__ == "__main__":
    main()
