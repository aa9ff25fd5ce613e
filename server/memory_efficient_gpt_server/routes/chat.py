"""POST /v1/chat/completions: answer conversations.

Purpose: the chat body to a job, and OpenAI's shape of its answers.
Does not know: how a job is done, chat templates (the tokenizer has them).
Invariant: the first chunk of a choice has the role, the last one the finish reason and no text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

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
from memory_efficient_gpt_server.schemas import ChatBody
from memory_efficient_gpt_server.sse import event, json_text
from memory_efficient_gpt_server.text import Conversation, ScoredToken

router = APIRouter(dependencies=[Depends(require_key)])


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody))
async def create_chat_completion(
    request: Request,
    server: CurrentServer,
    client: CurrentClient,
    body: Annotated[ChatBody, Depends(json_body(ChatBody))],
) -> Response:
    """Answer a conversation."""
    model = server.catalog.get(body.model)
    await model.prepare()
    params = body.sampling(
        model.generation_defaults,
        max_tokens=body.output_limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    validate_sampling(params, body, model.vocab_size)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    dialect = ChatDialect(completion_id, model, body.include_usage)
    job = Job(completion_id, model, (Conversation(body.messages),), params, body, dialect, "messages")
    return GenerationResponse(server, client, job, record_of(request))


class ChatDialect:
    """OpenAI's `chat.completion` and `chat.completion.chunk`."""

    def __init__(self, completion_id: str, model: ServedModel, include_usage: bool) -> None:
        self._tokenizer = model.tokenizer
        self._common: dict[str, Any] = {
            "id": completion_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model.id,
            "system_fingerprint": None,
        }
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._templates: dict[int, Template] = {}

    def begin(self, index: int) -> bytes:
        """The role."""
        self._templates[index] = Template(self._chunk(index, {"content": Template.hole}, None, None))
        return event(to_json(self._chunk(index, {"role": "assistant", "content": ""}, None, None)))

    def delta(self, index: int, text: str, logprobs: Any) -> bytes:
        """New text."""
        if logprobs is None:
            return self._templates[index].fill(json_text(text))
        return event(to_json(self._chunk(index, {"content": text}, logprobs, None)))

    def finish(self, index: int, reason: str) -> bytes:
        """The choice's last event."""
        return event(to_json(self._chunk(index, {}, None, reason)))

    def last(self, usage: Usage | None, receipt: Mapping[str, Any] | None) -> bytes:
        """The event without choices."""
        return last_event(self._common, usage, receipt)

    def logprobs(self, tokens: Sequence[ScoredToken]) -> Any:
        """One object for each token."""
        content = [
            {
                **self._scored(token_id, entry.logprob),
                "top_logprobs": [self._scored(other, logprob) for other, logprob in entry.top],
            }
            for token_id, entry, _ in tokens
            if entry is not None
        ]
        return {"content": content, "refusal": None}

    def whole(
        self, choices: Sequence[FinishedChoice], usage: Usage, receipt: Mapping[str, Any] | None
    ) -> bytes:
        """The plain answer."""
        shown = [
            {
                "index": c.index,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                "logprobs": c.logprobs,
                "finish_reason": c.finish_reason,
            }
            for c in choices
        ]
        answer = {**self._common, "object": "chat.completion", "choices": shown, "usage": usage.as_json()}
        return to_json(answer | receipt_field(receipt))

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._common, "choices": [choice], **self._usage}

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        token, raw = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": token, "logprob": finite(logprob), "bytes": list(raw)}
