"""POST /v1/completions: continue texts.

Purpose: the completions body to a job, and OpenAI's shape of its answers.
Does not know: how a job is done.
Invariant: `logprobs.text_offset` counts characters of the choice's text, an echoed prompt included.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.request import TokenLogprob
from memory_efficient_gpt_server.body_problems import validate_sampling
from memory_efficient_gpt_server.deps import (
    CurrentClient,
    CurrentServer,
    body_schema,
    json_body,
    record_of,
    require_key,
)
from memory_efficient_gpt_server.models import ServedModel
from memory_efficient_gpt_server.routes.dialect import (
    FinishedChoice,
    Template,
    Usage,
    finite,
    last_event,
    receipt_field,
)
from memory_efficient_gpt_server.routes.generation import GenerationResponse
from memory_efficient_gpt_server.routes.job import Job
from memory_efficient_gpt_server.schemas import CompletionBody
from memory_efficient_gpt_server.sse import event, json_text
from memory_efficient_gpt_server.text import ScoredToken

router = APIRouter(dependencies=[Depends(require_key)])

DEFAULT_MAX_TOKENS: Final = 16


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
async def create_completion(
    request: Request,
    server: CurrentServer,
    client: CurrentClient,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
) -> Response:
    """Continue one or several prompts."""
    model = server.catalog.get(body.model)
    await model.prepare()
    echo, score_only = bool(body.echo), body.max_tokens == 0
    if score_only and not echo:
        raise InvalidRequestError(
            "max_tokens must be at least 1, got 0. Only with echo it may be 0, to score the prompt.",
            param="max_tokens",
        )
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens or 1
    params = body.sampling(
        model.generation_defaults,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if echo else None,
    )
    validate_sampling(params, body, model.vocab_size)
    if score_only:
        params = replace(params, logprobs=None)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    dialect = CompletionDialect(completion_id, model, body.include_usage)
    job = Job(
        completion_id, model, body.prompt, params, body, dialect, "prompt",
        continues_text=True, echo=echo, score_only=score_only,
    )  # fmt: skip
    return GenerationResponse(server, client, job, record_of(request))


class CompletionDialect:
    """OpenAI's `text_completion`."""

    def __init__(self, completion_id: str, model: ServedModel, include_usage: bool) -> None:
        self._tokenizer = model.tokenizer
        self._common: dict[str, Any] = {
            "id": completion_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.id,
            "system_fingerprint": None,
        }
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._templates: dict[int, Template] = {}

    def begin(self, index: int) -> bytes:
        """A completion's choice begins with its text."""
        self._templates[index] = Template(self._chunk(index, Template.hole, None, None))
        return b""

    def delta(self, index: int, text: str, logprobs: Any) -> bytes:
        """New text."""
        if logprobs is None:
            return self._templates[index].fill(json_text(text))
        return event(to_json(self._chunk(index, text, logprobs, None)))

    def finish(self, index: int, reason: str) -> bytes:
        """The choice's last event."""
        return event(to_json(self._chunk(index, "", None, reason)))

    def last(self, usage: Usage | None, receipt: Mapping[str, Any] | None) -> bytes:
        """The event without choices."""
        return last_event(self._common, usage, receipt)

    def logprobs(self, tokens: Sequence[ScoredToken]) -> Any:
        """Parallel lists; a prompt's first token has null."""
        return {
            "tokens": [self._tokenizer.token_text(token.token_id) for token in tokens],
            "token_logprobs": [None if t.entry is None else finite(t.entry.logprob) for t in tokens],
            "top_logprobs": [None if t.entry is None else self._best(t.entry) for t in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def whole(
        self, choices: Sequence[FinishedChoice], usage: Usage, receipt: Mapping[str, Any] | None
    ) -> bytes:
        """The plain answer."""
        shown = [
            {"text": c.text, "index": c.index, "logprobs": c.logprobs, "finish_reason": c.finish_reason}
            for c in choices
        ]
        answer = {**self._common, "choices": shown, "usage": usage.as_json(), **receipt_field(receipt)}
        return to_json(answer)

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
        return {**self._common, "choices": [choice], **self._usage}

    def _best(self, entry: TokenLogprob) -> dict[str, float]:
        """The chosen token and the likeliest ones by text; of tokens with one text the likelier counts."""
        best: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            best.setdefault(self._tokenizer.token_text(token_id), finite(logprob))
        return best
