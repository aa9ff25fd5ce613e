"""What a request has generated.

Purpose: one description of a generation, whatever API format it came in.
Does not know: how it is done.
Invariant: plain data that was checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt_server.models import ServedModel
from memory_efficient_gpt_server.routes.dialect import Dialect
from memory_efficient_gpt_server.schemas import GenerationBody
from memory_efficient_gpt_server.text import Prompt

UNSTATED_OUTPUT_TOKENS: Final = 1024
"""What a sequence is charged at admission if the request sets no limit to its output."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate. `field` is the prompts' field in the body; `echo` puts the prompt before its text.

    continues_text: the text goes on where the prompt ends, so a space before its first word is part of it.
    score_only: the one token that `params` asks for is not shown: only the prompt is scored.
    """

    id: str
    model: ServedModel
    prompts: Sequence[Prompt]
    params: SamplingParams
    body: GenerationBody
    dialect: Dialect
    field: str
    continues_text: bool = False
    echo: bool = False
    score_only: bool = False

    @property
    def charged_tokens(self) -> int:
        """Output tokens to reserve for all sequences."""
        each = UNSTATED_OUTPUT_TOKENS if self.params.max_tokens is None else self.params.max_tokens
        return each * self.params.n * len(self.prompts)
