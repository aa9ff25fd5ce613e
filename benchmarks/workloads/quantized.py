"""Quantized weights in the whole engine: against our bf16 and against llama.cpp's formats of the same bits.

Purpose: one stream, eight streams and a prompt of 128 tokens on a 1.1-billion-parameter model.
Does not know: HTTP, quality.
Invariant: rates are of decoding alone: new tokens after the first, by the seconds after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec

from benchmarks.measuring import (
    Conditions,
    Figure,
    Outcome,
    Target,
    interleaved,
    random_prompts,
    ratio_of_best,
    spread,
)
from benchmarks.peers.checkpoint import ensure_checkpoint
from benchmarks.peers.protocol import Generated, Peer
from benchmarks.peers.quantized_checkpoint import GGUF_TYPES, OUR_SCHEMES, quantized_folder, quantized_gguf
from benchmarks.workloads.generation import MISSING_LLAMA_CPP, NEW_TOKENS, PEERS_OPENMP, PROMPT_TOKENS, VOCAB

# (ours, other, streams): what the ratio of decoding rates should reach
DECODE_TARGETS = {
    ("int4", "bf16", 1): 2.5, ("int4", "q4_0", 1): 1.4, ("int4", "q4_0", 8): 2.5,
    ("int8", "bf16", 1): 1.6, ("int8", "q8_0", 1): 1.3, ("int8", "q8_0", 8): None, ("int4", "bf16", 8): None,
    ("int8", "bf16", 8): None,
}  # fmt: skip
PROMPT_TARGETS = {("int4", "q4_0"): 2.5, ("int8", "q8_0"): None, ("int4", "bf16"): None}


def quantized(conditions: Conditions) -> Outcome:
    """All engines stay loaded and take turns; one stream first, then eight."""
    with ExitStack() as running:
        used = {name: running.enter_context(peer) for name, peer in _peers(conditions).items()}
        measured = {
            streams: interleaved(
                {name: _call(peer, name, streams) for name, peer in used.items()},
                conditions.repetitions,
                conditions.advance,
            )
            for streams in (1, 8)
        }
        facts = {name: peer.facts for name, peer in used.items()}
    figures = [*_decode_figures(measured), *_prompt_figures(measured[1])]
    runs = {
        f"{n}, {s} at once": [asdict(r) for r in rs] for s, by in measured.items() for n, rs in by.items()
    }
    return Outcome(figures, facts, runs)


def _peers(conditions: Conditions) -> dict[str, Peer]:
    """Engines by what they compute with; llama.cpp's only where it is installed."""
    checkpoint = ensure_checkpoint("tinyllama", conditions.cache)
    threads = ["--threads", str(conditions.threads)]
    folders = {"bf16": checkpoint.folder} | {s: quantized_folder(checkpoint, s) for s in OUR_SCHEMES}
    found = {
        name: Peer(name, "benchmarks.peers.ours", ["--model", str(folder), *threads])
        for name, folder in folders.items()
    }
    if find_spec("llama_cpp") is not None and checkpoint.gguf.is_file():
        for kind in GGUF_TYPES:
            arguments = ["--model", str(quantized_gguf(checkpoint, kind)), *threads]
            found[kind] = Peer(kind, "benchmarks.peers.llama_cpp", arguments, PEERS_OPENMP)
    return found


def _call(peer: Peer, name: str, streams: int) -> Callable[[int], Generated]:
    mode = "parallel" if name in GGUF_TYPES else "together"

    def call(repetition: int) -> Generated:
        return peer.generate(mode, random_prompts(repetition, streams, PROMPT_TOKENS, VOCAB), NEW_TOKENS)

    return call


def decode_rate(run: Generated) -> float:
    """New tokens a second of all streams together, after each has its first."""
    after = sum(len(ids) - 1 for ids in run.token_ids)
    return after / (run.seconds - max(run.first_token_s))


def _decode_figures(measured: Mapping[int, Mapping[str, list[Generated]]]) -> list[Figure]:
    figures = []
    for streams, runs in measured.items():
        rates = {name: [decode_rate(run) for run in several] for name, several in runs.items()}
        label = "one stream" if streams == 1 else f"{streams} streams"
        figures += [
            Figure(f"{name}, {label}", max(values), "tokens/s", note=spread(values))
            for name, values in rates.items()
        ]
        for (ours, other, count), bound in DECODE_TARGETS.items():
            if count == streams:
                target = Target(bound) if bound is not None else None
                figures.append(_ratio(f"{ours} / {other}, {label}", rates, ours, other, target))
    return figures


def _prompt_figures(runs: Mapping[str, list[Generated]]) -> list[Figure]:
    """Rates of computing the prompt: 1 / seconds to the first token."""
    rates = {name: [1.0 / run.first_token_s[0] for run in several] for name, several in runs.items()}
    figures = [
        Figure(f"{name}, prompt of {PROMPT_TOKENS}", PROMPT_TOKENS * max(values), "tokens/s")
        for name, values in rates.items()
    ]
    for (ours, other), bound in PROMPT_TARGETS.items():
        target = Target(bound) if bound is not None else None
        figures.append(_ratio(f"{ours} / {other}, prompt of {PROMPT_TOKENS}", rates, ours, other, target))
    return figures


def _ratio(
    name: str, rates: Mapping[str, list[float]], ours: str, other: str, target: Target | None
) -> Figure:
    if other not in rates:
        return Figure(name, float("nan"), "x", target, MISSING_LLAMA_CPP)
    return Figure(name, ratio_of_best(rates[ours], rates[other], best=max), "x", target)
