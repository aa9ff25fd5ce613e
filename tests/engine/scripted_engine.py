"""An engine that does what a prompt's first token says: a fake for tests of the process split."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import CheckpointError, InvalidRequestError
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent
from memory_efficient_gpt.worker import ProgressCallback

COUNT, KILLED, HANG, FAIL, OUT_OF_MEMORY, REFUSE, SUBMIT_BUG = range(1, 8)

INFO = EngineInfo(
    model="scripted", architecture="None", tier="B", tier_reason="fake", dtype="float32", device="cpu",
    max_model_len=1 << 30, vocab_size=1000, eos_token_ids=(2,), num_kv_blocks=100, block_size=16,
    kv_cache_dtype="float32", weights_bytes=1, kv_cache_bytes=1, attention_backend="none", notes=("fake",),
)  # fmt: skip


def request(
    action: int, *, request_id: str = "r", delay_ms: int = 0, max_tokens: int = 5, n: int = 1
) -> Request:
    """A request whose sequences count from 0 to max_tokens - 1, `delay_ms` a step, or do worse."""
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(id=request_id, prompt_token_ids=(action, delay_ms), params=params)


@dataclass
class ScriptedEngine:
    """Emits one token of every sequence in each step. Resumed sequences count on."""

    info: EngineInfo = INFO
    running: dict[str, list[int | None]] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    counters: EngineStats = field(default_factory=lambda: EngineStats(num_kv_blocks=100))
    kv_limits: list[int] = field(default_factory=list)
    closed: bool = False
    asleep: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        assert not self.asleep, "a sleeping engine is given work"
        if request.prompt_token_ids[0] == REFUSE:
            raise InvalidRequestError("temperature must be lower.", param="temperature")
        if request.prompt_token_ids[0] == SUBMIT_BUG:
            raise KeyError("secret")
        self.requests[request.id] = request
        done = [len(request.tokens_before(index)) for index in range(request.params.n)]
        is_open = request.open_indices
        self.running[request.id] = [count if index in is_open else None for index, count in enumerate(done)]

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is not None and request_id in self.running:
            self.running[request_id][index] = None
        if index is None or not any(c is not None for c in self.running.get(request_id, [])):
            self.running.pop(request_id, None)

    def step(self) -> list[SequenceEvent]:
        events = []
        for request_id in list(self.running):
            self._act(*self.requests[request_id].prompt_token_ids)
            events += self._count(request_id)
        self.counters.steps += 1
        return events

    def _act(self, action: int, delay_ms: int) -> None:
        time.sleep(delay_ms / 1000)
        if action == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == HANG:
            time.sleep(1000)
        elif action == FAIL:
            raise RuntimeError("secret detail")
        elif action == OUT_OF_MEMORY:
            raise MemoryError

    def _count(self, request_id: str) -> list[SequenceEvent]:
        counts, limit = self.running[request_id], self.requests[request_id].params.max_tokens
        events = []
        for index, count in enumerate(counts):
            if count is not None:
                done = count + 1 == limit
                reason = FinishReason.LENGTH if done else None
                events.append(
                    SequenceEvent(request_id=request_id, index=index, token_ids=[count], finish_reason=reason)
                )
                counts[index] = None if done else count + 1
                self.counters.generated_tokens += 1
        if not any(count is not None for count in counts):
            del self.running[request_id]
        return events

    def stats(self) -> EngineStats:
        self.counters.num_running = len(self.running)
        self.counters.num_free_blocks = 100 - 10 * len(self.running)
        return self.counters

    def sleep(self) -> SleepReport:
        """Fails, hangs or dies as the model's name asks."""
        assert not self.running and not self.asleep
        self._stumble("sleep")
        self.asleep = True
        return SleepReport(kv_bytes=1, parked_bytes=self.info.weights_bytes, device_bytes=3)

    def wake(self) -> None:
        assert self.asleep
        self._stumble("wake")
        self.asleep = False

    def _stumble(self, at: str) -> None:
        match self.info.model.split():
            case ["fails", when] if when == at:
                raise MemoryError("secret detail")
            case ["hangs", when] if when == at:
                time.sleep(1000)
            case ["dies", when] if when == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def set_kv_limit(self, num_bytes: int) -> int:
        """Never below 1000."""
        self.kv_limits.append(num_bytes)
        self.counters.num_kv_blocks = num_bytes
        return max(1000, num_bytes)

    def close(self) -> None:
        self.closed = True


def load_scripted(config: EngineConfig, progress: ProgressCallback) -> ScriptedEngine:
    """Loads, or fails as the model's name asks.

    "WHAT-again FOLDER" does it from the second time on, "WHAT-second FOLDER" the second time only.
    "fails sleep", "hangs wake", "dies sleep" and so on load, and do it then.
    """
    progress("reading the script", 0.5)
    what = config.model
    if later := re.fullmatch(r"(\w+)-(again|second) (.+)", what):
        times = _times_loaded(Path(later[3]))
        what = later[1] if times == 2 or (times > 2 and later[2] == "again") else ""
    match what:
        case "damaged":
            raise CheckpointError("model.safetensors has 10 bytes, must have 20. Download it again.")
        case "buggy":
            raise ValueError("secret detail")
        case "dies":
            os._exit(9)
        case "babbles":
            (fd,) = _sockets()
            os.write(fd, b"\x00\x00\x00\x02\xc1\xc1")
            time.sleep(1000)
        case "endless":
            time.sleep(1000)
        case "slow":
            time.sleep(0.5)
    return ScriptedEngine(replace(INFO, model=config.model))


def _times_loaded(folder: Path) -> int:
    """Counts, this time included; in files, because each worker is a process of its own."""
    times = len(list(folder.iterdir())) + 1
    (folder / str(times)).touch()
    return times


def _sockets() -> list[int]:
    fds = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in fds if fd > 2 and _is_socket(fd)]


def _is_socket(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False
