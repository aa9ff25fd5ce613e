"""A running server's admin routes, for commands.

Purpose: from the options to an authorized client, and from what goes wrong to what to do next.
Does not know: what commands show.
Invariant: no message holds a key.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

from memory_efficient_gpt.errors import ConfigError, MegptError
from memory_efficient_gpt_server.commands.event_lines import ServerEvent, read_events
from memory_efficient_gpt_server.commands.options import ADMIN_KEY_ENV
from memory_efficient_gpt_server.commands.tables import one_line

if TYPE_CHECKING:
    import httpx

ANSWER_TIMEOUT_S: Final = 10.0

_GIVE_THE_KEY: Final = (
    f"Set {ADMIN_KEY_ENV} to the admin key that the server was started with, or name a file that holds it "
    "with --admin-key-file."
)
_NEXT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "eviction_needed": "`megpt load` without --no-evict does that; `megpt models` shows what each takes.",
        "insufficient_memory": "`megpt models` shows what each takes.",
        "models_busy": "`megpt top` shows who uses them.",
        "model_busy": "`megpt unload`: --mode drain waits for its requests, --mode abort ends them.",
        "operation_not_found": "`megpt operations` does so, too.",
        "request_timeout": "It goes on; `megpt ps` shows how far it is.",
        "wrong_state": "`megpt models` shows it.",
    }
)
"""What to do after an error, by its code, where the server's own message does not say it."""


class ServerRefusedError(MegptError):
    """The server can't be reached, or does not do what was asked."""

    code = "server_refused"


class AdminClient:
    """Asks one server. Every method raises ServerRefusedError. key_source: where the key was given."""

    def __init__(
        self,
        url: str,
        key: str | None,
        key_source: str = ADMIN_KEY_ENV,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        self._key_source = None if key is None else key_source
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, transport=transport)
        except httpx.InvalidURL as error:
            raise ConfigError([f"--url {url!r} is no address: {error}."]) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def models(self) -> list[dict[str, Any]]:
        """Every model as the server's registry sees it."""
        found: list[dict[str, Any]] = self._json(self._send("GET", "/admin/models"), "models")["models"]
        return found

    def memory(self) -> dict[str, Any]:
        """Every device's budget, and who holds what."""
        return self._json(self._send("GET", "/admin/memory"), "devices")

    def metrics(self) -> str:
        """The server's numbers in Prometheus' text format."""
        return self._send("GET", "/metrics").text

    def operate(self, model: str, operation: str, body: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Load, unload, sleep or wake: whether it is done, and the model as it is now.

        A wait has no time limit.
        """
        path = f"{self._path_of(model)}/{operation}"
        response = self._send("POST", path, body, timeout_s=None if body["wait"] else ANSWER_TIMEOUT_S)
        return response.status_code == 200, self._json(response, "state")

    def change(self, model: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Change a model's settings; the model as it is now."""
        return self._json(self._send("PATCH", self._path_of(model), settings), "state")

    def queue(self) -> dict[str, Any]:
        """Who waits for which model."""
        return self._json(self._send("GET", "/admin/queue"), "groups")

    def operations(self) -> dict[str, Any]:
        """What administrators have asked for, the newest first."""
        return self._json(self._send("GET", "/admin/operations"), "operations")

    def operation(self, operation_id: str) -> dict[str, Any]:
        """One of these."""
        return self._json(self._send("GET", _operation_path(operation_id)), "state")

    def cancel(self, operation_id: str) -> dict[str, Any]:
        """Call it off; the operation as it is then."""
        return self._json(self._send("DELETE", _operation_path(operation_id)), "state")

    def events(self, after: str | None = None) -> Iterator[ServerEvent]:
        """What happens to models, until the server ends the stream. after: the id of the last event read."""
        import httpx

        headers = {} if after is None else {"Last-Event-ID": after}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, read=None)  # nothing may happen for hours
        try:
            with self._client.stream("GET", "/admin/events", headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    raise ServerRefusedError(self._why(response))
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise ServerRefusedError(self._no_server_there(response))
                yield from read_events(response.iter_lines())
        except httpx.HTTPError as error:
            raise ServerRefusedError(self._unreachable(error)) from None

    def _path_of(self, model: str) -> str:
        if "/" in model:  # no id has one, and the server would take it for another path
            known = ", ".join(sorted(found["id"] for found in self.models()))
            raise ServerRefusedError(f"There is no model {model!r} here. Models: {known}.")
        return f"/admin/models/{quote(model, safe='')}"

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> httpx.Response:
        import httpx

        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, read=timeout_s)
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise ServerRefusedError(
                f"The server at {self.url} did not answer within {ANSWER_TIMEOUT_S:g} s. Try again later."
            ) from None
        except httpx.HTTPError as error:
            raise ServerRefusedError(self._unreachable(error)) from None
        if response.is_success:
            return response
        raise ServerRefusedError(self._why(response))

    def _json(self, response: httpx.Response, field: str) -> dict[str, Any]:
        """The answer, which must be an object with `field`."""
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or field not in found:
            raise ServerRefusedError(self._no_server_there(response))
        return found

    def _unreachable(self, error: Exception) -> str:
        return (
            f"The server at {self.url} can't be reached: {error}. Is it running? Start one with "
            "`megpt serve --config configs/many_models.yaml`, or give another --url."
        )

    def _no_server_there(self, response: httpx.Response) -> str:
        return (
            f"{self.url} answered {response.status_code}, but not as a megpt server with /admin does. "
            "Give its address with --url."
        )

    def _why(self, response: httpx.Response) -> str:
        try:
            error = response.json()["error"]
            code, message = error["code"], one_line(str(error["message"]))
        except (ValueError, KeyError, TypeError):
            code, message = "not_found", ""
        if code == "not_found":
            return self._no_server_there(response)
        if response.status_code == 401:
            return self._wrong_key()
        if response.status_code == 403 and self._key_source is not None:
            return f"{message} The key that was sent is from {self._key_source}."
        return f"{message} {_NEXT.get(code, '')}".rstrip()

    def _wrong_key(self) -> str:
        if self._key_source is None:
            return f"The server at {self.url} wants a key. {_GIVE_THE_KEY}"
        return f"The server at {self.url} does not know the key from {self._key_source}. {_GIVE_THE_KEY}"


def _operation_path(operation_id: str) -> str:
    if not re.fullmatch(r"[\w-]+", operation_id, re.ASCII):  # the server would take it for another path
        raise ServerRefusedError(
            f"There is no operation {operation_id[:80]!r}. `megpt operations` lists those that are known."
        )
    return f"/admin/operations/{operation_id}"


def admin_client(args: argparse.Namespace) -> AdminClient:
    """The client that the options describe. Raises ConfigError."""
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError([f"--url must begin with http:// or https://, got {args.url!r}."])
    source = ADMIN_KEY_ENV if args.admin_key_file is None else str(args.admin_key_file)
    key = os.environ.get(ADMIN_KEY_ENV) if args.admin_key_file is None else _from_file(args)
    if key is None or not key.strip():
        return AdminClient(args.url, None)
    key = key.strip()
    if key.startswith("sha256:"):
        raise ConfigError([f"{source} holds the key's digest, which only a server can use; give the key."])
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError([f"{source} holds no key: a key is printable ASCII without spaces."])
    return AdminClient(args.url, key, source)


def _from_file(args: argparse.Namespace) -> str:
    try:
        key: str = args.admin_key_file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError([f"--admin-key-file {args.admin_key_file} can't be read: {reason}."]) from None
    if not key.strip():
        raise ConfigError([f"--admin-key-file {args.admin_key_file} is empty."])
    return key
