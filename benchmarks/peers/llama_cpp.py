"""The llama.cpp peer: its own batch interface with several sequences, greedy, bf16 weights.

Purpose: what llama.cpp gives when its decode calls hold all sequences, as its server makes them.
Does not know: the other engines.
Invariant: no Python wrapper between: every step is one `llama_decode` over all running sequences.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Generated, serve

TOKENS_PER_BATCH = 2048
ERROR_LEVEL = 4


def log_errors(level: int, text: bytes, _: Any) -> None:
    """Pass on llama.cpp's errors and drop its chatter."""
    if level == ERROR_LEVEL:
        print(text.decode(), end="", file=sys.stderr)


LOG_CALLBACK = llama_cpp.llama_log_callback(log_errors)  # llama.cpp keeps the pointer: never freed


class LlamaCppGenerator:
    """A model loaded by llama.cpp, with one context for each number of parallel sequences."""

    def __init__(self, path: str, threads: int, tokens_per_sequence: int) -> None:
        llama_cpp.llama_log_set(LOG_CALLBACK, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {path}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._tokens_per_sequence = tokens_per_sequence
        self._contexts: dict[int, Any] = {}

    def facts(self) -> dict[str, Any]:
        """Versions, the file's format and the instructions that llama.cpp was built for."""
        description = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self._model, description, len(description))
        return {
            "llama-cpp-python": llama_cpp.__version__,
            "model": description.value.decode(),
            "threads": self._threads,
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Generated:
        """mode: "parallel": prompts in one batch, then a token of each per step, as many of each."""
        context = self._context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        last = self._prefill(context, prompts)
        first_token_s = time.perf_counter() - started
        token_ids = [[token] for token in last]
        for step in range(new_tokens[0] - 1):
            positions = [len(prompt) + step for prompt in prompts]
            step_tokens = list(zip(last, positions, range(len(last)), strict=True))
            last = self._decode(context, step_tokens, range(len(last)))
            for ids, token in zip(token_ids, last, strict=True):
                ids.append(token)
        return Generated(token_ids, time.perf_counter() - started, [first_token_s] * len(prompts))

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = sequences * self._tokens_per_sequence
            parameters.n_seq_max = sequences
            parameters.n_batch = TOKENS_PER_BATCH
            parameters.n_threads = self._threads
            parameters.n_threads_batch = self._threads
            context = llama_cpp.llama_init_from_model(self._model, parameters)
            if not context:
                raise RuntimeError(f"llama.cpp can't make a context for {sequences} sequences")
            self._contexts[sequences] = context
        return self._contexts[sequences]

    def _prefill(self, context: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute all prompts, in as few calls as their tokens allow; the first new token of each."""
        first: list[int] = []
        group: list[tuple[int, int, int]] = []
        ends: list[int] = []
        for sequence, prompt in enumerate(prompts):
            if len(group) + len(prompt) > TOKENS_PER_BATCH:
                first += self._decode(context, group, ends)
                group, ends = [], []
            group += [(token, position, sequence) for position, token in enumerate(prompt)]
            ends.append(len(group) - 1)
        return first + self._decode(context, group, ends)

    def _decode(
        self, context: Any, tokens: Sequence[tuple[int, int, int]], wanted: Sequence[int]
    ) -> list[int]:
        """One llama_decode over (token, position, sequence); the likeliest token after each of `wanted`."""
        with filled_batch(tokens, set(wanted)) as batch:
            status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave status {status}")
        return [self._most_likely(context, entry) for entry in wanted]

    def _most_likely(self, context: Any, entry: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, entry)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


@contextmanager
def filled_batch(tokens: Sequence[tuple[int, int, int]], wanted: set[int]) -> Iterator[Any]:
    """A llama_batch of (token, position, sequence), freed afterwards; logits for the `wanted` entries."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for entry, (token, position, sequence) in enumerate(tokens):
            batch.token[entry] = token
            batch.pos[entry] = position
            batch.n_seq_id[entry] = 1
            batch.seq_id[entry][0] = sequence
            batch.logits[entry] = entry in wanted
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def main() -> None:
    """Answer commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens-per-sequence", type=int, default=256)
    options = parser.parse_args()
    serve(lambda: LlamaCppGenerator(options.model, options.threads, options.tokens_per_sequence))


if __name__ == "__main__":
    main()
