"""The transformers peer: `generate` in bf16 with SDPA attention, one prompt at a time or as a static batch.

Purpose: what a competent user of transformers gets without a serving engine.
Does not know: the other engines.
Invariant: inference mode, the given number of threads, exactly the asked number of new tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.protocol import Generated, serve


class FirstToken(BaseStreamer):
    """Notes when the first new token came: `generate` puts the prompt first, then each step's tokens."""

    def __init__(self) -> None:
        self.at = 0.0
        self._puts = 0

    def put(self, value: torch.Tensor) -> None:
        """Called with int64 ids."""
        self._puts += 1
        if self._puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Called after the last token."""


class TransformersGenerator:
    """A model loaded by transformers."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        # Its own defaults would end a sequence at the model's end-of-sequence token.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )

    def facts(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
            "dtype": str(self._model.dtype),
        }

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Generated:
        """mode: "one_by_one", or "static_batch" for prompts of one length and one number of new tokens."""
        if mode == "static_batch":
            return self._together(prompts, new_tokens[0])
        token_ids: list[list[int]] = []
        first_token_s: list[float] = []
        started = time.perf_counter()
        for prompt, wanted in zip(prompts, new_tokens, strict=True):
            first = FirstToken()
            token_ids += self._continue([prompt], wanted, first)
            first_token_s.append(first.at - started)
        return Generated(token_ids, time.perf_counter() - started, first_token_s)

    def _together(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generated:
        started = time.perf_counter()
        token_ids = self._continue(prompts, new_tokens, None)
        return Generated(token_ids, time.perf_counter() - started, [])

    @torch.inference_mode()
    def _continue(
        self, batch: Sequence[Sequence[int]], new_tokens: int, streamer: FirstToken | None
    ) -> list[list[int]]:
        ids = torch.tensor(batch)
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=streamer
        )
        new: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return new


def main() -> None:
    """Answer commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    serve(lambda: TransformersGenerator(options.model, options.threads))


if __name__ == "__main__":
    main()
