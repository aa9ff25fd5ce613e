"""Tier C: models that cannot be packed run through transformers' own generate, one sequence at a time.

Purpose: serve recurrent hybrids and models whose attention cannot be reached, correctly if slowly.
Does not know: KV blocks (its sequences own some on paper only), batching.
Invariant: at most one generation thread lives; it computes only while `launch` waits for it.

transformers' generate knows how to prepare every architecture's cache, so it drives: a logits
processor hands each step's logits to the engine and blocks until the engine has chosen the token.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memory_efficient_gpt.sequence import Sequence, Step
from memory_efficient_gpt.step_sampling import PendingStep, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Stopped(BaseException):
    """Unwinds a generation thread whose sequence is over."""


@dataclass(slots=True)
class _Failure:
    error: BaseException


class _Generation:
    """One sequence inside transformers' generate, advanced a token at a time."""

    def __init__(self, model: PreTrainedModel, tokens: list[int], max_len: int) -> None:
        self._model = model
        self._tokens = tokens
        self._max_new_tokens = max_len - len(tokens)
        self._logits: queue.SimpleQueue[torch.Tensor | _Failure] = queue.SimpleQueue()
        self._chosen: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="megpt-generate", daemon=True)
        self._thread.start()

    def logits(self) -> torch.Tensor:
        """The next token's logits `[1, V]`; waits for the model. Raises what the model raised."""
        result = self._logits.get()
        if isinstance(result, _Failure):
            raise result.error
        return result

    def choose(self, token_id: int) -> None:
        """Continue with this token."""
        self._chosen.put(token_id)

    def stop(self) -> None:
        """End the thread."""
        self._chosen.put(None)
        self._thread.join()

    def _run(self) -> None:
        from transformers import GenerationConfig, LogitsProcessorList

        config = GenerationConfig(
            max_new_tokens=self._max_new_tokens, do_sample=False, use_cache=True, pad_token_id=0
        )
        ids = torch.tensor([self._tokens], dtype=torch.int64, device=self._model.device)
        model: Any = self._model  # PreTrainedModel doesn't declare generate
        own = model.generation_config
        model.generation_config = GenerationConfig()  # the checkpoint's sampling defaults are not ours
        try:
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([self._exchange]),
                )
            raise RuntimeError("transformers ended a generation that the engine still needs")
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001  thread boundary: delivered to the waiting engine
            self._logits.put(_Failure(error))
        finally:
            model.generation_config = own

    def _exchange(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logits.put(scores.detach())
        token_id = self._chosen.get()
        if token_id is None:
            raise _Stopped
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token_id] = 0.0
        return forced


class TransformersRunner:
    """Runs steps of exactly one chunk: a whole sequence's known tokens, or one more."""

    def __init__(self, model: PreTrainedModel, *, device: torch.device, end_ids: tuple[int, ...]) -> None:
        self._model = model
        self._device = device
        self._end_ids = end_ids
        self._current: tuple[Sequence, _Generation] | None = None

    def launch(self, step: Step) -> PendingStep:
        """Compute one sequence's next logits and sample."""
        (chunk,) = step.chunks
        seq = chunk.seq
        if chunk.start == 0 or self._current is None or self._current[0] is not seq:
            self.rest()
            self._current = (seq, _Generation(self._model, list(seq.tokens), seq.max_len))
        else:
            self._current[1].choose(seq.tokens[-1])
        with torch.inference_mode():
            logits = self._current[1].logits()
            if chunk.prompt_logprobs is not None:
                ids = torch.tensor([seq.tokens], dtype=torch.int64, device=self._device)
                prompt = self._model(input_ids=ids, use_cache=False).logits[0, : seq.prompt_len - 1]
                logits = torch.cat([logits, prompt.to(logits.dtype)])
            return draw(step, logits, self._end_ids)

    def rest(self) -> None:
        """End the generation under way, if any."""
        if self._current is not None:
            self._current[1].stop()
            self._current = None

    def forget_addresses(self) -> None:
        """It knows none."""
