"""What surrounds every request: its id, its log line, its count, and the last net for errors.

Purpose: one pure ASGI layer, so that streams and cancellation pass through untouched.
Does not know: what routes do.
Invariant: every request gets exactly one id, one log line and one count, however it ends.

HEAD is answered as GET is, without the body; routes see a GET.
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
_PROBES: Final = frozenset({"/livez", "/readyz"})
"""Asked every few seconds for as long as the server runs."""

_METHODS: Final = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})


class RequestScope:
    """The outermost layer. Puts `megpt.request_id` and `megpt.record` into the scope."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._last_probes: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        without_body = method == "HEAD"
        if without_body:
            scope = {**scope, "method": "GET"}  # a copy: the server's own still says HEAD
        record = RequestRecord(id=request_id, method=method)
        scope["megpt.request_id"], scope["megpt.record"] = request_id, record
        token = request_id_var.set(request_id)
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            elif without_body:
                message["body"] = b""
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
        log_request(logger, record, quiet=self._repeats(record))

    def _repeats(self, record: RequestRecord) -> bool:
        """Whether this is a health check with the same answer as the one before: no news."""
        if record.route not in _PROBES:
            return False
        last = self._last_probes.get(record.route)
        self._last_probes[record.route] = record.status
        return record.status == last


def _request_id(scope: Scope) -> str:
    """The client's own id if it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode())
    return f"req-{uuid.uuid4().hex}"
