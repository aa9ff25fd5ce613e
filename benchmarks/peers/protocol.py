"""The conversation between the benchmark and an engine in its own process: JSON lines over two pipes.

Purpose: `serve` answers on the engine's side, `Peer` asks on the benchmark's side.
Does not know: any engine.
Invariant: one command, one answer; whatever a library prints goes to standard error, never into an answer.

A process for each engine keeps their allocators and thread pools apart, while their measurements can
still take turns: an engine that is not asked anything only waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self


@dataclass(frozen=True, slots=True)
class Generated:
    """What one command gave. Times in seconds since the command.

    token_ids: the new tokens of each prompt. seconds: until the last token of all.
    first_token_s: until each prompt's first token; empty where the engine does not tell.
    cpu_s: what all threads of the engine's process used, in CPU seconds.
    counters: what else the engine counts, in total since it was loaded.
    """

    token_ids: list[list[int]]
    seconds: float
    first_token_s: list[float]
    counters: dict[str, Any] = field(default_factory=dict)
    cpu_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all prompts by seconds, prompt computation included."""
        return sum(map(len, self.token_ids)) / self.seconds


class Generator(Protocol):
    """The engine's side: greedy continuation of token ids, end-of-sequence ignored."""

    def facts(self) -> dict[str, Any]:
        """Versions and settings, for the record."""
        ...

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Generated:
        """Continue each prompt by exactly its number of `new_tokens`."""
        ...


def serve(load: Callable[[], Generator]) -> None:
    """Answer commands from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    generator = load()
    print(json.dumps({"load_s": time.perf_counter() - started, **generator.facts()}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        cpu_before_s = time.process_time()
        generated = generator.generate(command["mode"], command["prompts"], command["new_tokens"])
        cpu_s = time.process_time() - cpu_before_s
        print(json.dumps({**asdict(generated), "cpu_s": cpu_s}), file=answers)


@dataclass(slots=True)
class Peer:
    """The benchmark's side of one engine's process. Use as a context manager.

    environment: what to change in ours for the engine; None removes a variable.
    """

    name: str
    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start the process and wait until it has loaded. Raises RuntimeError if it ends instead."""
        assert self._process is None, f"{self.name} runs already"
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in {**os.environ, **self.environment}.items() if v is not None},
        )
        self.facts = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin and process.stdout
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def generate(
        self, mode: str, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int]
    ) -> Generated:
        """Ask the engine; one number of `new_tokens` holds for every prompt.

        Raises RuntimeError if it has ended or gave another number of tokens.
        """
        assert self._process and self._process.stdin
        wanted = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
        command = {"mode": mode, "prompts": [list(p) for p in prompts], "new_tokens": wanted}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        generated = Generated(**self._read())
        lengths = [len(ids) for ids in generated.token_ids]
        if lengths != wanted:
            raise RuntimeError(f"{self.name} gave {lengths} new tokens instead of {wanted}")
        return generated

    def _read(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"{self.name} ended with status {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer
