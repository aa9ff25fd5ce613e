"""Layers of routed experts on a GPU: our grouped kernels beside what transformers computes them with.

Purpose: milliseconds of a layer for models' shapes and numbers of tokens, and their share of the floor.
Does not know: the engine, routers.
Invariant: every call routes other tokens, so experts come from memory as in a step; times are of calls inside
one CUDA graph, except of what can't be captured, whose times hold the host's.

    python -m benchmarks.experts_gpu --out experts.json          needs a CUDA device; about a minute
    python -m benchmarks.experts_gpu --out tiles.json --sweep    which tiles are fastest; several minutes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.progress import track
from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.gpu_timing import copy_bandwidth, graph_us, require_triton
from benchmarks.machine import accelerator_facts, versions
from memory_efficient_gpt.triton_kernels.expert_tiles import ExpertTile, row_class
from memory_efficient_gpt.triton_kernels.packing import OUTPUT_MULTIPLE, SPAN, TritonWeight

if TYPE_CHECKING:
    from memory_efficient_gpt.triton_kernels.experts import Stack

LAYERS: Final[dict[str, tuple[type, PreTrainedConfig, int]]] = {
    "Mixtral-8x7B": (MixtralExperts, MixtralConfig(hidden_size=4096, intermediate_size=14336), 2),
    "Qwen3-30B-A3B": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128),
        8,
    ),
}
"""The experts' class, what it is made of, choices of a token."""
TOKENS: Final = (1, 8, 32, 128, 2048)
SCHEMES: Final = ("int4-g128", "int4-g32")
FLOPS: Final = 790e12
"""Dense bfloat16 products that an H200 was measured to do in a second."""
_CALLS: Final = 8
_MOST_BATCHED_TOKENS: Final = 8
"""batched_mm copies each pair's expert."""
_MOST_EAGER_TOKENS: Final = 128
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def random_weight(experts: int, outputs: int, inputs: int, group: int) -> TritonWeight:
    """A stack in 4 bits with random codes: times don't depend on them."""
    rows = experts * outputs
    padded = -(-rows // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
    spans = -(-inputs // SPAN)
    codes = torch.randint(-(1 << 15), 1 << 15, (spans, padded, 32), dtype=torch.int16, device="cuda")
    scales = torch.rand(spans * SPAN // group, padded, device="cuda").half() / 64
    return TritonWeight("int4", codes, scales, None, 1.0, rows, inputs, group)


def arms_of(module: torch.nn.Module) -> dict[str, tuple[int, Call]]:
    """Bytes of an expert and the call, by arm."""
    from memory_efficient_gpt.triton_kernels.experts import Stack

    merged, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    experts = merged.shape[0]
    dense = (merged[0].numel() + down[0].numel()) * merged.element_size()
    stacks = Stack(merged, experts), Stack(down, experts)
    arms: dict[str, tuple[int, Call]] = {"bf16": (dense, partial(ours, stacks))}
    for scheme in SCHEMES:
        group = int(scheme.split("-g")[1])
        packed = [random_weight(experts, w.shape[1], w.shape[2], group) for w in (merged, down)]
        size = sum(w.num_bytes for w in packed) // experts
        arms[scheme] = size, partial(ours, (Stack(packed[0], experts), Stack(packed[1], experts)))
    for name in ("grouped_mm", "batched_mm", "eager"):
        arms[f"transformers {name}"] = dense, partial(theirs, module, name)
    return arms


def ours(
    stacks: tuple[Stack, Stack], x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor,
    tiles: tuple[ExpertTile, ExpertTile] | None = None,
) -> torch.Tensor:  # fmt: skip
    """By the grouped kernels."""
    from memory_efficient_gpt.triton_kernels.experts import Gate, routed_mlp

    return routed_mlp(x, index, weights, *stacks, Gate(), tiles=tiles)


def theirs(
    module: Any, implementation: str, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """By transformers."""
    module.config._experts_implementation = implementation
    return module(x, index, weights)  # type: ignore[no-any-return]


def routings(tokens: int, hidden: int, experts: int, choices: int) -> list[tuple[torch.Tensor, ...]]:
    """Tokens that choose experts at random, others at each call."""
    found: list[tuple[torch.Tensor, ...]] = []
    for seed in range(_CALLS):
        generator = torch.Generator("cuda").manual_seed(seed)
        scores = torch.rand(tokens, experts, generator=generator, device="cuda")
        weights, index = scores.topk(choices)
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
        found.append((x, index, weights.bfloat16()))
    return found


def eager_us(calls: list[Callable[[], object]]) -> float:
    """Of a call that waits for the device, the host's time included."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(calls) * 1e6


def measure(name: str) -> Iterator[dict[str, Any]]:
    """One record for each arm and number of tokens."""
    kind, config, choices = LAYERS[name]
    with torch.device("cuda"):
        module = kind(config).to(torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    experts, hidden, inner = module.down_proj.shape
    arms = arms_of(module)
    for tokens in TOKENS:
        inputs = routings(tokens, hidden, experts, choices)
        touched = sum(len(index.unique()) for _, index, _ in inputs) / len(inputs)
        for arm, (size, call) in arms.items():
            if arm.endswith("batched_mm") and tokens > _MOST_BATCHED_TOKENS:
                continue
            if arm.endswith("eager") and tokens > _MOST_EAGER_TOKENS:
                continue
            calls: list[Callable[[], object]] = [partial(call, *given) for given in inputs]
            record = {"layer": name, "arm": arm, "tokens": tokens, "bytes": round(touched * size),
                      "flops": 6 * tokens * choices * hidden * inner}  # fmt: skip
            try:
                us = eager_us(calls) if arm.endswith("eager") else graph_us(calls)
                yield {**record, "us": round(us, 2)}
            except Exception as error:  # noqa: BLE001  # a peer that can't run here is reported, not fatal
                torch.cuda.synchronize()
                yield {**record, "us": None, "error": f"{type(error).__name__}: {str(error)[:160]}"}


def candidates(arm: str, rows: int) -> Iterator[ExpertTile]:
    """Tiles of a class of rows that might be fastest."""
    if arm == "bf16":
        for outputs, inputs, warps, stages in product((32, 64, 128, 256), (64, 128, 256), (4, 8), (3, 4, 5)):
            buffers = (stages - 1) * (outputs + max(rows, 16)) * inputs * 2
            registers = outputs * max(rows, 16) / (32 * warps)
            if buffers <= 200_000 and 2 <= registers <= 160 and outputs * inputs >= 4096:
                yield ExpertTile(outputs, max(rows, 16), inputs, 1, warps, stages)
    else:
        for outputs, warps, stages in product((32, 64, 128), (4, 8), (3, 4)):
            if 2 <= outputs * rows / (32 * warps) <= 64:
                yield ExpertTile(outputs, rows, SPAN, 1, warps, stages)
            if rows <= 16 and outputs <= 64:
                yield ExpertTile(outputs, rows, SPAN, warps, warps, stages)


def sweep(name: str, deadline: float) -> Iterator[dict[str, Any]]:
    """The five fastest tiles of each case for both products; stops when time is up."""
    kind, config, choices = LAYERS[name]
    with torch.device("cuda"):
        module = kind(config).to(torch.bfloat16)
    experts, hidden, _ = module.down_proj.shape
    arms = arms_of(module)
    for arm, tokens in product(("bf16", SCHEMES[0]), TOKENS):
        inputs = routings(tokens, hidden, experts, choices)
        tried = []
        for tile in candidates(arm, row_class(tokens, choices, experts)):
            if time.monotonic() > deadline:
                break
            calls = [partial(arms[arm][1], *given, tiles=(tile, tile)) for given in inputs]  # type: ignore[call-arg]
            try:
                tried.append((round(graph_us(calls, replays=3), 2), asdict(tile)))
            except Exception as error:  # noqa: BLE001  # too much shared memory, for instance
                torch.cuda.synchronize()
                tried.append((float("inf"), {**asdict(tile), "error": str(error)[:80]}))
        now = round(graph_us([partial(arms[arm][1], *given) for given in inputs], replays=3), 2)
        best = sorted(tried, key=lambda pair: pair[0])[:5]
        yield {"layer": name, "arm": arm, "tokens": tokens, "us": now, "tried": len(tried), "best": best}


def table(records: list[dict[str, Any]], bandwidth: float) -> str:
    """Markdown: a row for each layer and number of tokens; shares of the floor in brackets."""
    arms = list(dict.fromkeys(record["arm"] for record in records))
    lines = ["| layer | tokens | " + " | ".join(arms) + " |", "|---|---:|" + "---:|" * len(arms)]
    for name, tokens in product(LAYERS, TOKENS):
        cells = []
        for arm in arms:
            found = [r for r in records if (r["layer"], r["tokens"], r["arm"]) == (name, tokens, arm)]
            if not found or found[0]["us"] is None:
                cells.append("-")
                continue
            floor = max(found[0]["bytes"] / bandwidth, found[0]["flops"] / FLOPS) * 1e6
            cells.append(f"{found[0]['us'] / 1000:.3f} ({floor / found[0]['us']:.0%})")
        lines.append(f"| {name} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--sweep", action="store_true", help="try tiles instead of comparing arms")
    parser.add_argument("--seconds", type=float, default=480, help="after which a sweep tries no more tiles")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args()
    require_triton()
    bandwidth, records = copy_bandwidth(), list[dict[str, Any]]()
    deadline = time.monotonic() + arguments.seconds
    for name in track(LAYERS, "measuring"):
        for record in sweep(name, deadline) if arguments.sweep else measure(name):
            records.append(record)
            if record.get("error") or arguments.sweep:
                Console().print(record, soft_wrap=True)
        torch.cuda.empty_cache()
    facts = {"bandwidth_bytes_per_s": bandwidth, "versions": versions(), "commit": arguments.commit,
             **accelerator_facts("cuda"), "results": records}  # fmt: skip
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if not arguments.sweep:
        print(f"milliseconds; in brackets the share of the floor: bytes of the experts that were chosen over "
              f"{bandwidth / 1e12:.2f} TB/s, or {FLOPS / 1e12:.0f} TFLOP/s")  # fmt: skip
        print(table(records, bandwidth))


if __name__ == "__main__":
    main()
