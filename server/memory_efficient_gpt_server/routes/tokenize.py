"""POST /v1/tokenize and /v1/detokenize: a model's tokenizer without its model.

Purpose: let clients count tokens before they ask for any.
Does not know: engines.
Invariant: tokenizing takes a place at admission as generating does, since it takes the same cores.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json

from memory_efficient_gpt_server.deps import (
    CurrentClient,
    CurrentServer,
    body_schema,
    json_body,
    record_of,
    require_key,
)
from memory_efficient_gpt_server.schemas import DetokenizeBody, TokenizeBody
from memory_efficient_gpt_server.text import Conversation, check_token_ids, encode, estimated_tokens, size_of

router = APIRouter(dependencies=[Depends(require_key)])


@router.post("/v1/tokenize", openapi_extra=body_schema(TokenizeBody))
async def tokenize(
    request: Request,
    server: CurrentServer,
    client: CurrentClient,
    body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))],
) -> Response:
    """Token ids of a text, or of a conversation through the chat template."""
    model = server.catalog.get(body.model)
    await model.prepare()
    record_of(request).model = model.id
    prompt = Conversation(body.messages or []) if body.prompt is None else body.prompt
    async with server.lifecycle.running(request.receive, server.settings.request_timeout_s):
        with server.admission.reserve(client.id, 1, estimated_tokens(prompt)):
            token_ids = await server.text_pool.run(
                size_of(prompt),
                lambda: encode(model.tokenizer, prompt, special_tokens=body.add_special_tokens is not False),
            )
    info = model.engine.info
    most = None if info is None else info.max_model_len  # not known before the model was loaded once
    answer = {"count": len(token_ids), "max_model_len": most, "tokens": token_ids}
    return Response(to_json(answer), media_type="application/json")


@router.post("/v1/detokenize", openapi_extra=body_schema(DetokenizeBody))
async def detokenize(
    request: Request,
    server: CurrentServer,
    client: CurrentClient,
    body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))],
) -> dict[str, str]:
    """The text of token ids."""
    model = server.catalog.get(body.model)
    await model.prepare()
    record_of(request).model = model.id
    check_token_ids(body.tokens, model.vocab_size, "tokens")
    async with server.lifecycle.running(request.receive, server.settings.request_timeout_s):
        with server.admission.reserve(client.id, 1, len(body.tokens)):
            text = await server.text_pool.run(len(body.tokens), lambda: model.tokenizer.decode(body.tokens))
    return {"prompt": text}
