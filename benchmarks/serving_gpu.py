"""Decoding, prompts and mixed traffic of models with random weights on one GPU, without a server around them.

Purpose: the workloads that other engines were measured with, in the same units and under the same keys.
Does not know: kernels, how a step is computed.
Invariant: every prompt is new (no prefix cache), every output has its full length; times are of whole runs.

    python -m benchmarks.serving_gpu --out h200.json                  needs a CUDA device; some minutes
    python -m benchmarks.serving_gpu --out h200.json --models llama8b --workloads decode_b1 decode_b8

`decode_bB`: B prompts of 512 random tokens, 256 new ones; ms_per_step = (t256 - t1) / 255, where t1 is the
same with one new token. `decode_ctx8k_bB`: prompts of 8,192, 128 new ones. `prefill_8x8k_tok_s`: 8 prompts of
8,192 tokens with one new token each. `mixed256`: 256 requests at once, prompts and outputs of 100 to 1,024
tokens, temperature 0.6. Medians of three runs after one; mixed256 is run twice and the second one counts.
`--steps` tells where the time of each workload's last run went, and costs some of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.machine import accelerator_facts, versions
from benchmarks.step_profile import StepProfile
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.request import Request, SamplingParams

_LLAMA8B: Final[dict[str, Any]] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=16384,
    tie_word_embeddings=False, rope_theta=500000.0,
)  # fmt: skip
_QWEN06B: Final[dict[str, Any]] = dict(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=16384,
    tie_word_embeddings=True,
)  # fmt: skip
MODELS: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "llama8b": ("llama", _LLAMA8B, {}),
    "llama8b-int8kv": ("llama", _LLAMA8B, {"kv_cache_dtype": "int8"}),
    "llama8b-int4": ("llama", _LLAMA8B, {"quantization": "int4-g128"}),
    "llama8b-fp8": ("llama", _LLAMA8B, {"quantization": "fp8-dynamic"}),
    "llama8b-deterministic": ("llama", _LLAMA8B, {"deterministic": True}),
    "llama8b-int4-deterministic": ("llama", _LLAMA8B, {"quantization": "int4-g128", "deterministic": True}),
    "qwen06b": ("qwen3", _QWEN06B, {}),
}
WORKLOADS: Final = (
    "decode_b1", "decode_b8", "decode_b32", "decode_b64", "decode_b128", "prefill_1x8k_s",
    "prefill_8x8k_tok_s", "decode_ctx8k_b8", "decode_ctx8k_b16", "mixed256",
)  # fmt: skip


def random_model(kind: str, shape: dict[str, Any]) -> Any:
    """A model on the GPU with small random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    config: Any = config_class(**shape, dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: Any = model_class(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def make_engine(name: str) -> tuple[Engine, float]:
    """An engine of one of MODELS, and the seconds from nothing to ready."""
    kind, shape, options = MODELS[name]
    began = time.perf_counter()
    model = random_model(kind, shape)
    options = dict(options)
    if (scheme := options.pop("quantization", None)) is not None:
        quantize_model(model, uniform_plan(find_layers(model), parse_scheme(scheme)))
    config = EngineConfig(
        model=name, device="cuda", max_model_len=8192 + 256, max_num_seqs=256, max_batched_tokens=8192,
        prefix_cache=False, **options,
    )  # fmt: skip
    engine = Engine.from_model(model, config)
    torch.cuda.synchronize()
    return engine, time.perf_counter() - began


def run(engine: Engine, lengths: Sequence[tuple[int, int]], *, temperature: float = 0.0) -> float:
    """Seconds for requests of (prompt, output) tokens that all arrive at once."""
    vocabulary, rng = engine.info.vocab_size, random.Random(time.perf_counter_ns())
    requests = [
        Request(
            id=str(number),
            prompt_token_ids=tuple(rng.choices(range(3, vocabulary), k=prompt)),
            params=SamplingParams(temperature=temperature, max_tokens=output, ignore_eos=True),
        )
        for number, (prompt, output) in enumerate(lengths)
    ]
    began = time.perf_counter()
    for request in requests:
        engine.submit(request)
    count = 0
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            count += len(event.token_ids)
    seconds = time.perf_counter() - began
    assert count == sum(output for _, output in lengths), "tokens are missing"
    return seconds


def median(engine: Engine, lengths: Sequence[tuple[int, int]], runs: int = 3) -> float:
    """The median of `runs`, after one that counts for nothing."""
    run(engine, lengths)
    return statistics.median(run(engine, lengths) for _ in range(runs))


def decode(engine: Engine, batch: int, prompt: int, output: int) -> dict[str, float]:
    """Milliseconds of a decoding step."""
    first = median(engine, [(prompt, 1)] * batch)
    whole = median(engine, [(prompt, output)] * batch, runs=3 if prompt < 4096 else 1)
    step_s = (whole - first) / (output - 1)
    return {"t1": first, f"t{output}": whole, "ms_per_step": step_s * 1000, "tok_s": batch / step_s}


def mixed(engine: Engine) -> dict[str, float]:
    """256 requests of mixed lengths."""
    rng = random.Random(1)
    prompts = [rng.randint(100, 1024) for _ in range(256)]
    lengths = list(zip(prompts, [rng.randint(100, 1024) for _ in range(256)], strict=True))
    cold = run(engine, lengths, temperature=0.6)
    warm = run(engine, lengths, temperature=0.6)
    tokens = sum(output for _, output in lengths)
    return {"s": warm, "out_tok": tokens, "out_tok_s": tokens / warm, "first_run_s": cold}


def measure(engine: Engine, workload: str) -> Any:
    """One figure or record of a workload."""
    if workload == "mixed256":
        return mixed(engine)
    if workload == "prefill_1x8k_s":
        return median(engine, [(8192, 1)])
    if workload == "prefill_8x8k_tok_s":
        return 8 * 8192 / median(engine, [(8192, 1)] * 8)
    batch = int(workload.rsplit("b", 1)[1])
    return decode(engine, batch, 8192, 128) if "ctx8k" in workload else decode(engine, batch, 512, 256)


def measure_all(
    models: Sequence[str],
    workloads: Sequence[str],
    save: Callable[[dict[str, Any]], None],
    *,
    steps: bool = False,
) -> None:
    """Every workload of every model; `save` is called after each. steps: profile each one's last run."""
    results: dict[str, Any] = {}
    console = Console()
    for name in models:
        engine, seconds = make_engine(name)
        results[name] = {"what": name.split("-")[0], "init_s": seconds, "notes": list(engine.info.notes)}
        console.print(f"{name}: ready after {seconds:.1f} s; {'; '.join(engine.info.notes)}")
        profile = StepProfile(engine) if steps else None
        for workload in workloads:
            try:
                results[name][workload] = measure(engine, workload)
            except torch.OutOfMemoryError as error:
                results[name][workload] = {"error": str(error).splitlines()[0]}
            console.print(name, workload, _short(results[name][workload]))
            if profile is not None:
                profile.print(console)
                results[name][f"{workload}_steps"] = profile.summary()
            save(results)
        if (counts := _graph_counts(engine)) is not None:
            results[name]["graphs"] = counts
        results[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
        save(results)
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _graph_counts(engine: Engine) -> dict[str, int] | None:
    graphs = getattr(engine._runner, "_replays", None)
    return None if graphs is None else {"captured": graphs.captured, "replayed": graphs.replayed}


def _short(figure: Any) -> Any:
    if isinstance(figure, dict):
        return {
            name: round(value, 3) if isinstance(value, float) else value for name, value in figure.items()
        }
    return round(figure, 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    parser.add_argument("--steps", action="store_true", help="tell where the time of steps goes, by kind")
    arguments = parser.parse_args()

    def save(results: dict[str, Any]) -> None:
        record = {"machine": accelerator_facts("cuda"), "versions": versions(), "commit": arguments.commit,
                  "results": results}  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    measure_all(arguments.models, arguments.workloads, save, steps=arguments.steps)


if __name__ == "__main__":
    main()
