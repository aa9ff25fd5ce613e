"""A model hub on this machine: the real client downloads from it when HF_ENDPOINT names it.

Purpose: one repository of the files of a folder, by the hub's own routes.
Does not know: who asks; other repositories are 404.
Invariant: only what was put into it is served, under one commit; `paths` has what was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """repository: org/name. revisions: names that it has besides its commit."""

    repository: str
    folder: Path
    revisions: tuple[str, ...] = ("main",)
    url: str = ""
    paths: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """Body and headers for a path; None: there is nothing."""
        self.paths.append(path)
        api, files = f"/api/models/{self.repository}/", f"/{self.repository}/resolve/"
        known = (*self.revisions, COMMIT)
        if path.startswith(api):
            what, _, revision = path.removeprefix(api).partition("/")
            tells = {"revision": self._about, "tree": self._tree}.get(what)
            return (json.dumps(tells()).encode(), {}) if tells is not None and revision in known else None
        revision, _, name = path.removeprefix(files).partition("/")
        if path.startswith(files) and revision in known and (self.folder / name).is_file():
            body = (self.folder / name).read_bytes()
            return body, {"ETag": f'"{_digest(body)}"', "X-Repo-Commit": COMMIT}
        return None

    def _about(self) -> dict[str, Any]:
        siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
        named = {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": siblings}
        return {**named, "private": False, "tags": [], "downloads": 0}

    def _tree(self) -> list[dict[str, Any]]:
        bodies = {file.name: file.read_bytes() for file in sorted(self.folder.iterdir())}
        return [
            {"type": "file", "path": name, "size": len(body), "oid": _digest(body)}
            for name, body in bodies.items()
        ]


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@contextlib.contextmanager
def hub(repository: str, folder: Path) -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    served = FakeHub(repository, folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = served.answer(self.path.partition("?")[0])
            body, headers = found or (b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            self.send_response(200 if found else 404)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
