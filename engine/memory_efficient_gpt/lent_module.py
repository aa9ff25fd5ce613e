"""A transformers module that an engine borrows while it generates.

Purpose: build the engine around a module that others use too, change to the paged cache, continue prompts.
Does not know: how the module's weights are stored, text (LLM does), what users pass in.
Invariant: between calls the module is as its owner left it: attention, mode, positions. Kernels stay. An
engine is used only while the module's tensors are those that it was built around: it keeps their addresses,
and keys and values that they gave.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from memory_efficient_gpt.api import LLM, Completion
from memory_efficient_gpt.assembly import build
from memory_efficient_gpt.attention.model_setup import prepare_model, setup_kept
from memory_efficient_gpt.choice import Choice
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.generation_options import GenerationOptions, own_names, sampling_params
from memory_efficient_gpt.loading import quantization_notes
from memory_efficient_gpt.module_state import state_of
from memory_efficient_gpt.tiers import TierDecision, decide_tier
from memory_efficient_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_UNPAGED: Final = TierDecision("C", "the paged KV cache was not asked for")


class LentModule:
    """One module and its engine: tier C, with transformers' own cache, until `use_paged_kv_cache`."""

    def __init__(
        self, module: PreTrainedModel, tokenizer: Tokenizer | None, config: EngineConfig, folder: Path | None
    ) -> None:
        """folder: where the module came from, if it is a checkpoint. Raises ConfigError."""
        self.module = module
        self.tokenizer = tokenizer
        self.folder = folder
        self._config = config
        self._paged_wanted = False
        self._llm = self._served(_UNPAGED)
        self._state = state_of(module)

    @property
    def info(self) -> EngineInfo:
        """How prompts are continued."""
        return self._llm.info

    @property
    def is_paged(self) -> bool:
        """Whether the engine's own cache is used."""
        return self.info.tier != "C"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts. Raises InvalidRequestError if there is no tokenizer."""
        with own_names():
            return [self._llm.tokenizer.encode(text) for text in texts]

    def complete(self, prompts: Sequence[list[int]], options: GenerationOptions) -> list[Completion]:
        """Continue prompts of at least one token each. Raises InvalidRequestError in the options' names, and
        what building an engine raises if the module was changed."""
        self.follow_changes()
        room = self.info.max_model_len - max(map(len, prompts), default=0)
        advice = getattr(self.module, "generation_config", None)
        with own_names(), self._lent():
            params = sampling_params(options, advice, room=room)
            completions: list[Completion] = self._llm.generate(prompts, params)
        return completions

    def use_paged_kv_cache(self) -> Choice:
        """Change to the engine's cache if the tier probe allows it. Raises ConfigError."""
        self.follow_changes()
        if not self.is_paged:
            decision = self._decide()
            if decision.tier == "C":
                return Choice("transformers", False, decision.reason)
            self._llm = self._served(decision)
            self._state, self._paged_wanted = state_of(self.module), True
        info = self.info
        pool = f"{info.num_kv_blocks:,} blocks of {info.block_size} tokens"
        size = f"{info.kv_cache_bytes / 1e6:,.1f} MB"
        reason = f"{info.tier_reason}; {pool}, {size}, attention by {info.attention_backend}"
        return Choice("paged", True, reason)

    def follow_changes(self) -> None:
        """Build the engine anew if the module's layers or tensors are others than it was built around.

        Raises ConfigError or UnsupportedModelError if it can't be; the next call tries again.
        """
        if state_of(self.module) == self._state:
            return
        logger.info("%s was changed: its engine is built anew.", self._config.model)
        self._state = ()
        decision = self._decide() if self._paged_wanted else _UNPAGED
        if self._paged_wanted and decision.tier == "C":
            logger.warning("%s: no paged KV cache any more: %s", self._config.model, decision.reason)
        self._llm.engine.retire()
        self._llm = self._served(decision)
        self._state = state_of(self.module)

    def _decide(self) -> TierDecision:
        config = self._config
        return decide_tier(self.module.config, forced=config.tier, max_model_len=config.max_model_len)

    def _served(self, decision: TierDecision) -> LLM:
        folder, config = self.folder, self._config
        with setup_kept(self.module):
            parts = build(
                self.module,
                decision,
                config,
                device=self.module.device,
                name=config.model,
                folder=folder,
                notes=quantization_notes(folder) if folder is not None else (),
            )
        return LLM.around(Engine(parts, debug_checks=config.debug_checks), self.tokenizer)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        with setup_kept(self.module):
            if self.is_paged:
                prepare_model(self.module)
            else:
                self.module.train(False)
            yield
