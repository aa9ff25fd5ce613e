"""`megpt serve` in a process of its own, watched from outside.

Purpose: start it, see what its processes take, stop it, and tell what it left behind.
Does not know: models, requests.
Invariant: after `stop` none of the processes that were ever seen is left, or it is named; a process is known
by its id and its start, so that a reused id is no mistake.

Workers are forked from the fork server and share its pages, so the sum of their resident bytes counts those
pages once for each. Private bytes are what would come back if the worker ended.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import yaml

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 60.0
INTERVAL_S: Final = 0.25


class WatchedServer:
    """A server with its memory sampled every INTERVAL_S. `most` has the greatest sums over all workers.

    helpers_rss_bytes: of the fork server and multiprocessing's tracker, which no model owns.
    """

    command = (sys.executable, "-m", "memory_efficient_gpt_server")

    def __init__(self, settings: dict[str, Any], folder: Path, admin_key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        self._output = folder / "output.txt"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MEGPT_")}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*self.command, "serve", "--config", str(folder / "config.yaml"), "--port", "0"],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**clean, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                     "MEGPT_ADMIN_KEY": admin_key},
            )  # fmt: skip
        self.seen: set[tuple[int, int]] = set()
        self.workers_seen: set[tuple[int, int]] = set()
        self.most = {"private_bytes": 0, "anonymous_bytes": 0, "rss_bytes": 0, "workers": 0}
        self.most["helpers_rss_bytes"] = 0
        self.samples, self.longest_gap_s = 0, 0.0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def url(self) -> str:
        """Where it listens, once it does. Raises RuntimeError if it does not start."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := re.search(r"serving on (http://\S+)", self.output()):
                return found[1]
            time.sleep(0.02)
        raise RuntimeError(f"the server did not start:\n{self.output()}")

    def output(self) -> str:
        """What it has printed and logged."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> dict[str, Any]:
        """End it as an operator would, and look for what is left."""
        self._ended.set()
        self._watcher.join()
        self._sample()
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        took_s, deadline = time.monotonic() - started, time.monotonic() + 2
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return {
            "exit_code": code, "took_s": took_s, "processes_seen": len(self.seen),
            "workers_seen": len(self.workers_seen), "left_behind": left,
        }  # fmt: skip

    def _left(self) -> list[str]:
        return [f"{pid} {_name(pid)}" for pid, start in sorted(self.seen) if _started(pid) == start]

    def _watch(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(INTERVAL_S):
            self._sample()
            now_s = time.monotonic()
            self.longest_gap_s, last_s = max(self.longest_gap_s, now_s - last_s), now_s

    def _sample(self) -> None:
        helpers = _children(self.process.pid)
        workers = [worker for helper in helpers for worker in _children(helper)]
        self.seen |= {(pid, start) for pid in helpers + workers if (start := _started(pid))}
        self.workers_seen |= {(pid, start) for pid in workers if (start := _started(pid))}
        sums = dict.fromkeys(self.most, 0) | {"workers": len(workers)}
        for pid in workers:
            for name, size in process_memory(pid).items():
                sums[name] += size
        sums["helpers_rss_bytes"] = sum(process_memory(pid).get("rss_bytes", 0) for pid in helpers)
        self.most = {name: max(size, sums[name]) for name, size in self.most.items()}
        self.samples += 1


def process_memory(pid: int) -> dict[str, int]:
    """A process's bytes; nothing if it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {
        "private_bytes": _kilobytes(r"^Private_(?:Clean|Dirty):", rollup),
        "anonymous_bytes": _kilobytes("^RssAnon:", status),
        "rss_bytes": _kilobytes("^VmRSS:", status),
    }


def _kilobytes(name: str, text: str) -> int:
    return 1024 * sum(int(size) for size in re.findall(rf"{name}\s+(\d+) kB", text, re.MULTILINE))


def _children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, file.read_text().split())
        except OSError:
            continue
    return found


def _started(pid: int) -> int | None:
    """When it started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
