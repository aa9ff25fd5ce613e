"""What surrounds every request: its id, its log line, its count, and the last net for errors.

Purpose: one pure ASGI layer, so that streams and cancellation pass through untouched.
Does not know: what routes do.
Invariant: every request gets exactly one id, one log line and one count, however it ends.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory_efficient_gpt_server.errors import STATUS_CLIENT_CLOSED, answer_for
from memory_efficient_gpt_server.logs import RequestRecord, log_request, request_id_var
from memory_efficient_gpt_server.metrics import Metrics

logger = logging.getLogger(__name__)

_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_METHODS: Final = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})


class RequestScope:
    """The outermost layer. Puts `megpt.request_id` and `megpt.record` into the scope."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        record = RequestRecord(id=request_id, method=method)
        scope["megpt.request_id"], scope["megpt.record"] = request_id, record
        token = request_id_var.set(request_id)
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("Request %s failed.", request_id)
            if record.status:
                return  # too late for an answer: the unfinished response makes uvicorn close the connection
            record.error = "internal_error"
            await answer_for(error, request_id).response()(scope, receive, send_with_id)
        finally:
            self._finish(scope, record)
            request_id_var.reset(token)

    def _finish(self, scope: Scope, record: RequestRecord) -> None:
        record.duration_s = time.perf_counter() - record.started_s
        record.status = record.status or STATUS_CLIENT_CLOSED
        route = scope.get("route")
        record.route = getattr(route, "path", record.route)
        self._metrics.count_http(record.route, record.method, record.status)
        log_request(logger, record)


def _request_id(scope: Scope) -> str:
    """The client's own id if it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode())
    return f"req-{uuid.uuid4().hex}"
