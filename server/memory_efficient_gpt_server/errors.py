"""How errors look to clients: one table, used for JSON answers and for events in a stream.

Purpose: exception -> status, OpenAI error body and headers.
Does not know: routes, models.
Invariant: whatever is raised, the body has OpenAI's shape, and an unexpected error tells nothing but its id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from memory_efficient_gpt.errors import (
    ConfigError,
    EngineFailedError,
    InvalidRequestError,
    MegptError,
    ModelLoadError,
    ModelNotFoundError,
    OverloadedError,
    SamplingFailedError,
)
from memory_efficient_gpt_server.logs import RequestRecord

LEAST_RETRY_AFTER_S: Final = 1
MOST_RETRY_AFTER_S: Final = 60
DRAIN_RETRY_AFTER_S: Final = 5.0
STATUS_CLIENT_CLOSED: Final = 499
"""Never sent: what the log and the metrics say of a client that left."""


class AuthenticationError(MegptError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"


class AdminRequiredError(MegptError):
    """The key is valid, but the route needs the admin key."""

    code = "admin_required"


class BodyTooLargeError(MegptError):
    """The request body is over the limit."""

    code = "body_too_large"


class BodyTimeoutError(MegptError):
    """The request body did not arrive in time."""

    code = "body_timeout"


class UnsupportedMediaTypeError(MegptError):
    """The body is not plain application/json."""

    code = "unsupported_media_type"


class ClientDisconnectedError(MegptError):
    """The client left; nobody reads the answer."""

    code = "client_disconnected"


class RequestTimeoutError(MegptError):
    """The request took longer than the server allows."""

    code = "request_timeout"


class StreamStalledError(MegptError):
    """The client does not read its stream."""

    code = "stream_stalled"


class QuotaExceededError(OverloadedError):
    """A key has as many sequences under way as it may have."""

    code = "concurrency_limit"


class ServerFullError(OverloadedError):
    """The server has as much under way as it may have."""

    code = "queue_full"


class ModelLoadingError(OverloadedError):
    """The model is not ready yet."""

    code = "model_loading"


class ModelNotLoadedError(ModelLoadingError):
    """The model is not loaded, and nothing loads it: the same request has the same answer a second later."""


class ModelsBusyError(OverloadedError):
    """There is no room for the model: those that are loaded are in use."""

    code = "models_busy"


class ChurnLimitedError(OverloadedError):
    """Models were swapped too often of late."""

    code = "churn_limited"


class ModelUnloadingError(OverloadedError):
    """An administrator unloads the model."""

    code = "model_unloading"


class DrainingError(OverloadedError):
    """The server is shutting down."""

    code = "draining"


def shutting_down() -> DrainingError:
    """What whoever asks from now on gets."""
    return DrainingError("The server is shutting down. Try again later.", retry_after_s=DRAIN_RETRY_AFTER_S)


class LoadFailedError(ModelLoadError):
    """A load on demand has failed; the message says why."""

    code = "load_failed"


class InsufficientMemoryError(MegptError):
    """The model is larger than the budget minus what is pinned. `details`: the plan, for the error's body."""

    code = "insufficient_memory"

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message, param="model")
        self.details = details


class ConflictError(MegptError):
    """An administrator's wish that the model's state or settings forbid."""


class ModelBusyError(ConflictError):
    """The model is in use or waited for."""

    code = "model_busy"


class ModelPinnedError(ConflictError):
    """The model is pinned."""

    code = "model_pinned"


class WrongStateError(ConflictError):
    """The wish makes no sense in the model's state."""

    code = "wrong_state"


class ModelExistsError(ConflictError):
    """There is a model of that id already."""

    code = "model_exists"


class BudgetTooSmallError(ConflictError):
    """A budget below what can't be freed. `details`: the figures, for the error's body."""

    code = "budget_too_small"

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message, param="budget_bytes")
        self.details = details


class EvictionNeededError(ConflictError):
    """A load for which nobody may leave, and somebody would have to. `details`: the plan, for the body."""

    code = "eviction_needed"

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message, param="evict")
        self.details = details


class KvLimitTooSmallError(ConflictError):
    """A hard limit in which no request of full length would fit. `details`: the figures, for the body."""

    code = "kv_limit_too_small"

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message, param="kv_hard_limit_bytes")
        self.details = details


class OperationCancelledError(ConflictError):
    """An administrator called the operation off while it went on."""

    code = "operation_cancelled"


class OperationNotFoundError(MegptError):
    """No operation of that id is known."""

    code = "operation_not_found"


class NoMemoryBudgetError(ConflictError):
    """The server keeps all its models loaded, so there is nothing to administer."""

    code = "no_memory_budget"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """The HTTP status of an error class, and OpenAI's word for its family."""

    status: int
    type: str


_KINDS: Final[dict[type[BaseException], ErrorKind]] = {
    InvalidRequestError: ErrorKind(400, "invalid_request_error"),
    AuthenticationError: ErrorKind(401, "authentication_error"),
    AdminRequiredError: ErrorKind(403, "permission_error"),
    ModelNotFoundError: ErrorKind(404, "invalid_request_error"),
    OperationNotFoundError: ErrorKind(404, "invalid_request_error"),
    BodyTimeoutError: ErrorKind(408, "invalid_request_error"),
    BodyTooLargeError: ErrorKind(413, "invalid_request_error"),
    UnsupportedMediaTypeError: ErrorKind(415, "invalid_request_error"),
    ConflictError: ErrorKind(409, "invalid_request_error"),
    QuotaExceededError: ErrorKind(429, "rate_limit_error"),
    ClientDisconnectedError: ErrorKind(STATUS_CLIENT_CLOSED, "client_closed_request"),
    StreamStalledError: ErrorKind(STATUS_CLIENT_CLOSED, "client_closed_request"),
    ConfigError: ErrorKind(500, "server_error"),
    EngineFailedError: ErrorKind(503, "service_unavailable_error"),  # the worker is being restarted
    SamplingFailedError: ErrorKind(500, "server_error"),
    OverloadedError: ErrorKind(503, "service_unavailable_error"),
    ModelLoadError: ErrorKind(503, "service_unavailable_error"),
    LoadFailedError: ErrorKind(500, "server_error"),
    InsufficientMemoryError: ErrorKind(507, "insufficient_memory_error"),
    RequestTimeoutError: ErrorKind(504, "server_error"),
}
_DETAILED: Final = (
    InsufficientMemoryError, BudgetTooSmallError, KvLimitTooSmallError, EvictionNeededError,
)  # fmt: skip
_INTERNAL: Final = ErrorKind(500, "server_error")
_HTTP_CODES: Final = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as a client gets it."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    details: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def body(self) -> bytes:
        """`{"error": {...}}` in OpenAI's shape, with the error's details added to it."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return to_json({"error": {**error, **self.details}}, inf_nan_mode="constants")

    def response(self) -> Response:
        """The whole HTTP answer."""
        return Response(
            self.body(), status_code=self.status, headers=dict(self.headers), media_type="application/json"
        )


def answer_for(error: BaseException, request_id: str) -> ErrorAnswer:
    """What a client is told of `error`. Unexpected errors become a fixed text with the request's id."""
    if isinstance(error, HTTPException):
        return _http_answer(error)
    kind = next((_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS), _INTERNAL)
    if not isinstance(error, MegptError) or kind is _INTERNAL:
        message = f"The server failed on this request; its log has the details under id {request_id}."
        return ErrorAnswer(kind.status, message, kind.type, MegptError.code)
    details = error.details if isinstance(error, _DETAILED) else {}
    return ErrorAnswer(
        kind.status, error.message, kind.type, error.code, error.param, _headers(error, kind), details
    )


def retry_after_s(error: OverloadedError) -> int:
    """Whole seconds for Retry-After, from 1 to 60."""
    wanted = error.retry_after_s if math.isfinite(error.retry_after_s) else MOST_RETRY_AFTER_S
    return min(max(math.ceil(wanted), LEAST_RETRY_AFTER_S), MOST_RETRY_AFTER_S)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error that a route raises an OpenAI-shaped answer."""
    for cls in (MegptError, HTTPException, RequestValidationError):
        app.add_exception_handler(cls, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    record: RequestRecord = request.scope["megpt.record"]
    answer = answer_for(error, record.id)
    record.error = answer.code
    response = answer.response()
    response.headers.update(request.scope.get("megpt.headers", {}))  # what its route says of the request
    return response


def _http_answer(error: HTTPException) -> ErrorAnswer:
    """Errors of the framework itself: no such path, wrong method."""
    message = {
        404: "There is no such path here. GET / lists what there is.",
        405: "This path does not answer to this method.",
    }.get(error.status_code, str(error.detail))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    headers = tuple((error.headers or {}).items())
    return ErrorAnswer(error.status_code, message, kind, code, headers=headers)


def _headers(error: MegptError, kind: ErrorKind) -> tuple[tuple[str, str], ...]:
    if isinstance(error, ModelNotLoadedError):
        return (("x-should-retry", "false"),)
    if isinstance(error, OverloadedError):
        return (("retry-after", str(retry_after_s(error))),)
    if isinstance(error, ModelLoadError | InsufficientMemoryError):
        return (("x-should-retry", "false"),)
    if kind.status == 401:
        return (("www-authenticate", "Bearer"),)
    if kind.status in (408, 413, 415):
        return (("connection", "close"),)
    return ()
