"""What routes depend on: the server's parts, the client's identity, the checked body.

Purpose: authentication, and turning a request body into a schema.
Does not know: what routes do with them.
Invariant: keys are compared as SHA-256 digests in constant time; a body is capped before it is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.admission import Admission
from memory_efficient_gpt_server.body_problems import refused_body
from memory_efficient_gpt_server.errors import (
    AdminRequiredError,
    AuthenticationError,
    BodyTimeoutError,
    BodyTooLargeError,
    ClientDisconnectedError,
    UnsupportedMediaTypeError,
)
from memory_efficient_gpt_server.keys import key_digest
from memory_efficient_gpt_server.lifecycle import Lifecycle
from memory_efficient_gpt_server.logs import RequestRecord
from memory_efficient_gpt_server.metrics import Metrics
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.settings import Settings
from memory_efficient_gpt_server.text import TextPool

_Schema = TypeVar("_Schema", bound=BaseModel)
_DISCARD_FACTOR: Final = 8
_DISCARD_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: `id` is derived from the key ("" if no keys are configured)."""

    id: str
    is_admin: bool = False


class KeyRing:
    """The configured keys, as digests."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [(key_digest(key.get_secret_value()), False) for key in settings.api_keys]
        if settings.admin_key is not None:
            self._digests.append((key_digest(settings.admin_key.get_secret_value()), True))

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def identify(self, authorization: str | None) -> Client:
        """The client of an Authorization header. Raises AuthenticationError."""
        if self.open:
            return Client("")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError(
                "You didn't give an API key. Send it in the header: Authorization: Bearer YOUR_KEY."
            )
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for known, is_admin in self._digests:  # all of them, always: time must not tell which one matched
            if hmac.compare_digest(known, digest):
                found = Client(digest.hex()[:16], is_admin)
        if found is None:
            raise AuthenticationError("The API key is not valid.")
        return found


@dataclass(frozen=True, slots=True)
class Server:
    """All parts of a running server; `app.state.megpt` holds it."""

    settings: Settings
    catalog: ModelCatalog
    admission: Admission
    lifecycle: Lifecycle
    metrics: Metrics
    text_pool: TextPool
    keys: KeyRing


def server_of(request: Request) -> Server:
    """The server that answers `request`."""
    server: Server = request.app.state.megpt
    return server


def record_of(request: Request) -> RequestRecord:
    """The log record of `request`."""
    record: RequestRecord = request.scope["megpt.record"]
    return record


def require_key(request: Request) -> Client:
    """The client. Raises AuthenticationError if keys are configured and this is none of them."""
    client = server_of(request).keys.identify(request.headers.get("authorization"))
    record_of(request).client = client.id or None
    return client


def require_admin(request: Request, client: Annotated[Client, Depends(require_key)]) -> Client:
    """The client, who must be the administrator. Without a configured admin key nobody is."""
    if server_of(request).settings.admin_key is None:
        raise AdminRequiredError(
            "No admin key is configured, so nobody may do this. Set MEGPT_ADMIN_KEY (for example to the "
            "output of `openssl rand -hex 32`) and start the server again."
        )
    if not client.is_admin:
        raise AdminRequiredError("This needs the admin key (MEGPT_ADMIN_KEY).")
    return client


WAITING_ROUTES: Final = ("load", "unload", "sleep", "wake")


def known_query(request: Request) -> bool | None:
    """What the query says of waiting, for routes of operations; other parameters are refused by name.

    Raises InvalidRequestError.
    """
    may_wait = request.method == "POST" and request.url.path.rsplit("/", 1)[-1] in WAITING_ROUTES
    for name, value in request.query_params.multi_items():
        if name != "wait" or not may_wait:
            known = "wait is the only one" if may_wait else "it takes none"
            raise InvalidRequestError(
                f"{name[:80]!r} is not a query parameter of this path; {known}. Leave it out.",
                param=name[:80],
            )
        if value not in ("true", "false"):
            raise InvalidRequestError(f"wait must be true or false, got {value[:80]!r}.", param="wait")
    wait = request.query_params.get("wait")
    return None if wait is None else wait == "true"


ADMIN_ONLY: Final = (Depends(require_admin), Depends(known_query))
"""What every route of administrators depends on."""


def require_metrics_access(request: Request) -> None:
    """As `require_key`, unless the settings make metrics public."""
    if not server_of(request).settings.metrics_public:
        require_key(request)


def open_to_all() -> None:
    """Marks the routes that answer without a key."""


CurrentServer = Annotated[Server, Depends(server_of)]
CurrentClient = Annotated[Client, Depends(require_key)]


def json_body(schema: type[_Schema], *, optional: bool = False) -> Callable[[Request], Awaitable[_Schema]]:
    """A dependency that reads the body as `schema`. optional: whether no body is as good as `{}`."""

    async def read(request: Request) -> _Schema:
        absent = optional and _announces_nothing(request)
        body = b"{}" if absent else await read_body(request, server_of(request).settings)
        try:
            return schema.model_validate_json(body, strict=True)
        except ValidationError as error:
            raise refused_body(error, body) from None

    return read


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that `json_body` reads."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


async def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body. Raises if it is not plain JSON by its headers, too large or too slow."""
    _require_plain_json(request)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _receive_at_most(request, settings.max_body_bytes)
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {settings.body_timeout_s:g} s.") from None


async def _receive_at_most(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size, more, too_large = 0, True, _announced_bytes(request) > limit
    while more and not too_large:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError("The client closed the connection while it sent the body.")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        more, too_large = message.get("more_body", False), size > limit
    if too_large:
        if more:
            await _discard(request, _DISCARD_FACTOR * limit)
        raise BodyTooLargeError(
            f"The body is larger than {limit} bytes, the limit of this server. Send less."
        )
    return b"".join(chunks)


async def _discard(request: Request, most: int) -> None:
    """Read on for a moment: many clients read an answer only after they have written everything."""
    discarded, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_TIMEOUT_S):
            while more and discarded < most:
                message = await request.receive()
                discarded += len(message.get("body", b""))
                more = message.get("more_body", False)


def _require_plain_json(request: Request) -> None:
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {encoding[:40]!r} is not supported; send the body uncompressed."
        )
    content_type, _, parameters = request.headers.get("content-type", "").partition(";")
    if content_type.strip().lower() != "application/json":
        raise UnsupportedMediaTypeError(
            f"The body must be application/json, got {content_type.strip()[:80] or 'no Content-Type'!r}. "
            "Send the header Content-Type: application/json."
        )
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if charset not in ("", "charset=utf-8"):
        raise UnsupportedMediaTypeError(f"The body must be in UTF-8, got {parameters.strip()[:80]!r}.")


def _announces_nothing(request: Request) -> bool:
    return "transfer-encoding" not in request.headers and _announced_bytes(request) == 0


def _announced_bytes(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() and len(length) < 20 else 0
