"""Tokens per second against transformers and llama.cpp, on the same 1.1-billion-parameter weights.

Purpose: eight clients at once, and one alone: 128 tokens in, 64 out, greedy, end-of-sequence ignored.
Does not know: HTTP; every engine is called in its own process.
Invariant: the same bf16 numbers, prompts and threads for all; an engine that is not installed is named.
"""

from __future__ import annotations

from collections.abc import Callable
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
from benchmarks.peers.checkpoint import Checkpoint, ensure_checkpoint
from benchmarks.peers.protocol import Generated, Peer

PROMPT_TOKENS = 128
NEW_TOKENS = 64
VOCAB = 32_000
# How long OpenMP's waiting threads spin. Ours sleep at once, as in the server. Peers spin shortly: as fast as
# the default (llama.cpp: 50 ms a token, against 58 when they sleep at once), and it does not collapse, as
# the default does, when anything else runs on the machine (1 instead of 20 tokens/s in the worst run).
PEERS_OPENMP = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "10000"}
MISSING_LLAMA_CPP = "llama.cpp was not measured: `make peers` installs it"

Arm = tuple[str, str, str]  # name, peer, mode


def eight_clients(conditions: Conditions) -> Outcome:
    """All eight prompts are there at once."""
    arms = [
        ("ours", "ours", "together"),
        ("transformers one by one", "transformers", "one_by_one"),
        ("transformers static batch", "transformers", "static_batch"),
        ("llama.cpp parallel", "llama.cpp", "parallel"),
    ]
    targets = {
        "transformers one by one": Target(3.0),
        "transformers static batch": Target(1.2),
        "llama.cpp parallel": Target(0.9),
    }
    return compare(conditions, arms, targets, clients=8)


def one_client(conditions: Conditions) -> Outcome:
    """One prompt at a time."""
    arms = [
        ("ours", "ours", "together"),
        ("transformers", "transformers", "one_by_one"),
        ("llama.cpp", "llama.cpp", "parallel"),
    ]
    return compare(conditions, arms, {"transformers": Target(1.2), "llama.cpp": Target(0.9)}, clients=1)


def compare(conditions: Conditions, arms: list[Arm], targets: dict[str, Target], clients: int) -> Outcome:
    """Measure the arms in turns; ours by each other's tokens per second."""
    checkpoint = ensure_checkpoint("tinyllama", conditions.cache)
    available = peers(checkpoint, conditions.threads)
    with ExitStack() as running:
        wanted = dict.fromkeys(peer for _, peer, _ in arms if peer in available)
        used = {name: running.enter_context(available[name]) for name in wanted}
        measured = interleaved(
            {name: _call(used[peer], mode, clients) for name, peer, mode in arms if peer in used},
            conditions.repetitions,
            conditions.advance,
        )
        facts = {name: peer.facts for name, peer in used.items()}
    rates = {name: [run.tokens_per_s for run in runs] for name, runs in measured.items()}
    figures = [Figure("ours", max(rates["ours"]), "tokens/s", note=spread(rates["ours"]))]
    for name in targets:
        if name in rates:
            cpu = ratio_of_best(*([run.cpu_s for run in measured[arm]] for arm in ("ours", name)), best=min)
            note = f"{name}: {spread(rates[name])} tokens/s; CPU seconds, ours / {name}: {cpu:.2f}"
            value = ratio_of_best(rates["ours"], rates[name], best=max)
            figures.append(Figure(f"ours / {name}", value, "x", targets[name], note))
        else:
            figures.append(Figure(f"ours / {name}", float("nan"), "x", targets[name], MISSING_LLAMA_CPP))
    runs = {name: [asdict(run) for run in several] for name, several in measured.items()}
    facts["weights"] = {"bytes_per_token": checkpoint.bytes_per_token}
    return Outcome(figures, facts, runs)


def peers(checkpoint: Checkpoint, threads: int) -> dict[str, Peer]:
    """The engines that are installed, not yet started."""
    common = ["--threads", str(threads)]
    folder = ["--model", str(checkpoint.folder), *common]
    found = {
        "ours": Peer("ours", "benchmarks.peers.ours", folder),
        "transformers": Peer("transformers", "benchmarks.peers.transformers_generate", folder, PEERS_OPENMP),
    }
    if find_spec("llama_cpp") is not None and checkpoint.gguf.is_file():
        arguments = ["--model", str(checkpoint.gguf), *common]
        found["llama.cpp"] = Peer("llama.cpp", "benchmarks.peers.llama_cpp", arguments, PEERS_OPENMP)
    return found


def _call(peer: Peer, mode: str, clients: int) -> Callable[[int], Generated]:
    def call(repetition: int) -> Generated:
        prompts = random_prompts(repetition, clients, PROMPT_TOKENS, VOCAB)
        return peer.generate(mode, prompts, NEW_TOKENS)

    return call
