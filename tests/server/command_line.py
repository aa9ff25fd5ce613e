"""`megpt` run as users run it: once, or as a server."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MEGPT = [sys.executable, "-m", "memory_efficient_gpt_server"]
START_TIMEOUT_S = 60


def clean_environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MEGPT_")}
    return {**clean, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **extra}


def megpt(*args: str, stdin: str = "", timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MEGPT, *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=clean_environment(**env),
        check=False,
    )


class RunningServer:
    """`megpt serve` on a free port, its output collected."""

    def __init__(self, *args: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [*MEGPT, "serve", "--port", "0", *(("--num-threads", "1") if "--model" in args else ()), *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(**env),
            start_new_session=True,
        )  # fmt: skip
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """A match in what was printed to standard output so far or later."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if match := re.search(pattern, "".join(self.out)):
                return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} was not printed:\n{''.join(self.out)}\n{''.join(self.err)}")

    def url(self) -> str:
        url = self.wait_for(r"serving on (http://\S+)")[1]
        self.wait_for("try it:")
        return url

    def workers(self) -> list[int]:
        """Process ids of all descendants."""
        found: list[int] = []
        todo = [self.process.pid]
        while todo:
            children = Path(f"/proc/{todo[0]}/task/{todo.pop(0)}/children").read_text().split()
            found += map(int, children)
            todo += map(int, children)
        return found

    def wait(self, timeout_s: float = 20) -> int:
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


@contextlib.contextmanager
def serving(*args: str, **env: str) -> Iterator[RunningServer]:
    server = RunningServer(*args, **env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def assert_gone(pids: list[int], within_s: float = 2) -> None:
    """So soon after the server's end."""
    deadline = time.monotonic() + within_s
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
