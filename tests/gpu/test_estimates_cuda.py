"""What an estimate says of a GPU before any weight is read, beside what the device shows once it is loaded.

Run on a machine with a GPU: python -m pytest -m gpu -s tests/gpu/test_estimates_cuda.py
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.engine_gpu import write_model
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.memory.estimation import estimate
from memory_efficient_gpt.memory.figures import MemoryEstimate
from memory_efficient_gpt.memory.workspace import CUDA_CONTEXT_BYTES
from memory_efficient_gpt.request import Request, SamplingParams

pytestmark = pytest.mark.gpu

TOLERANCE = 0.05
SLACK = 192 << 20
"""Bytes beside weights and cache that no estimate counts: inputs of steps, rounding, workspaces."""

TINY: list[tuple[str, dict[str, Any]]] = [
    ("demo", {}),
    ("demo", {"quantization": "int4"}),
    ("demo", {"quantization": "int8", "kv_cache_dtype": "int8"}),
    ("demo-mha", {}),
    ("demo-mha", {"kv_cache_dtype": "fp8"}),
    ("demo-draft", {"quantization": "int4-g128"}),
    ("tiny", {}),
    ("tiny", {"quantization": "int4-g128"}),
    ("tiny", {"quantization": "fp8"}),
]
LARGE: list[dict[str, Any]] = [{}, {"quantization": "int4-g128"}]

Folders = Callable[[str], str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """What to load for a name: a bundled model's is its own, shapes are written with random weights once."""
    written: dict[str, Path] = {}

    def find(name: str) -> str:
        if name.startswith("demo"):
            return name
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            write_model(written[name], name, "cuda")
            free()
        return str(written[name])

    yield find
    for folder in written.values():
        for file in folder.iterdir():  # an 8B model is 16 GB
            file.unlink()


def free() -> None:
    """So that what is taken is what the engine takes."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def used() -> int:
    """Bytes of the device that are not free, whoever has them."""
    left, total = torch.cuda.mem_get_info()
    return total - left


def work(engine: Engine) -> None:
    """A step of the largest size, and as many sequences as may run together."""
    for number in range(32):
        prompt = tuple(range(3, 3 + 256))
        params = SamplingParams(temperature=1.0, top_p=0.9, seed=1, max_tokens=4, ignore_eos=True)
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None


class Taken:
    """Bytes that a loaded engine took: of torch's, of the device's; and of the device's after work.

    peak: most bytes of torch's while it was loaded, in so many seconds.
    """

    def __init__(self, config: EngineConfig) -> None:
        free()
        torch_before, device_before = torch.cuda.memory_allocated(), used()
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        engine = Engine.load(config)
        try:
            torch.cuda.synchronize()
            self.seconds = time.monotonic() - began
            self.peak = torch.cuda.max_memory_allocated() - torch_before
            self.info = engine.info
            self.allocated = torch.cuda.memory_allocated() - torch_before
            self.loaded = used() - device_before
            work(engine)
            self.worked = used() - device_before
        finally:
            engine.close()
            del engine
            free()


def measured(model: str, options: dict[str, Any], kv_bytes: int) -> tuple[MemoryEstimate, Taken]:
    config = EngineConfig(
        model=model, device="cuda", max_model_len=512, max_num_seqs=32, kv_cache_bytes=kv_bytes,
        max_batched_tokens=2048, **options,
    )  # fmt: skip
    predicted = estimate(config)  # before anything is loaded
    return predicted, Taken(config)


def tell(name: str, options: dict[str, Any], predicted: MemoryEstimate, taken: Taken) -> None:
    both = predicted.weights_bytes + predicted.kv_cache_bytes
    pairs = {
        "weights": (predicted.weights_bytes, taken.info.weights_bytes),
        "KV cache": (predicted.kv_cache_bytes, taken.info.kv_cache_bytes),
        "both, of torch": (both, taken.allocated),
        "at most while loading": (max(predicted.load_peak_bytes, both), taken.peak),
        "all but the context, at work": (predicted.total_bytes - CUDA_CONTEXT_BYTES, taken.worked),
    }
    for what, (said, found) in pairs.items():
        Console().print(f"{name} {options}: {what}: {said:,} said, {found:,} found, {said / found:.3f}")
    Console().print(
        f"{name} {options}: loaded in {taken.seconds:.1f} s; "
        f"the device had {taken.loaded:,} less before it worked"
    )


@pytest.fixture(scope="module", autouse=True)
def warm(folders: Folders) -> None:
    """The context, and libraries that are loaded once for a process, are no model's."""
    measured("demo", {}, 16 << 20)


@pytest.mark.parametrize(("name", "options"), TINY, ids=str)
def test_a_small_model_takes_what_was_predicted(name: str, options: dict[str, Any], folders: Folders) -> None:
    predicted, taken = measured(folders(name), options, 256 << 20)
    tell(name, options, predicted, taken)
    assert taken.info.weights_bytes == predicted.weights_bytes
    assert taken.info.kv_cache_bytes == predicted.kv_cache_bytes
    both = predicted.weights_bytes + predicted.kv_cache_bytes
    assert both <= taken.allocated <= both + SLACK
    assert taken.worked <= predicted.total_bytes, "the allowance for steps does not cover them"


@pytest.mark.parametrize("options", LARGE, ids=str)
def test_an_8b_model_takes_what_was_predicted_within_five_percent(
    options: dict[str, Any], folders: Folders
) -> None:
    predicted, taken = measured(folders("llama8b"), options, 6 << 30)
    tell("llama8b", options, predicted, taken)
    assert taken.info.weights_bytes == predicted.weights_bytes
    assert taken.info.kv_cache_bytes == predicted.kv_cache_bytes
    both = predicted.weights_bytes + predicted.kv_cache_bytes
    assert taken.allocated == pytest.approx(both, rel=TOLERANCE)
    assert taken.loaded == pytest.approx(both, rel=TOLERANCE), "loading has left something behind"
    assert taken.peak <= max(predicted.load_peak_bytes, both) + SLACK
    assert taken.worked == pytest.approx(predicted.total_bytes - CUDA_CONTEXT_BYTES, rel=TOLERANCE)
