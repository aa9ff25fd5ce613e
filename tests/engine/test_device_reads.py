"""Tensors brought to a device through a few buffers: complete, in order, and not all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from memory_efficient_gpt import device_reads
from memory_efficient_gpt.device_reads import DeviceReader, bring

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_reads, "_BUFFER_BYTES", 96)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def filled(reader: DeviceReader, source: torch.Tensor) -> torch.Tensor:
    raw = source.reshape(-1).view(torch.uint8).numpy()

    def read(into: np.ndarray, begin: int) -> None:
        np.copyto(into, raw[begin : begin + into.size])

    target = torch.empty_like(source)
    reader.fill(target, read)
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (96,), (7, 41)], ids=str)
def test_a_tensor_of_any_size_is_filled_buffer_by_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = draw(*shape, dtype=dtype)
    with DeviceReader(CPU) as reader:
        got = filled(reader, source)
    assert torch.equal(got.reshape(-1).view(torch.uint8), source.reshape(-1).view(torch.uint8))


def test_more_threads_than_buffers_share_them() -> None:
    sources = [draw(50, seed=seed) for seed in range(40)]
    with DeviceReader(CPU) as reader, ThreadPoolExecutor(20) as threads:
        got = list(threads.map(lambda source: filled(reader, source), sources))
    assert all(torch.equal(own, source) for own, source in zip(got, sources, strict=True))


def test_a_read_that_fails_gives_its_buffer_back() -> None:
    def fail(into: np.ndarray, begin: int) -> None:
        raise OSError("the disk is gone")

    with DeviceReader(CPU) as reader:
        for _ in range(20):
            with pytest.raises(OSError, match="gone"):
                reader.fill(torch.empty(100), fail)
        assert torch.equal(filled(reader, draw(100)), draw(100))


class Weights:
    """Asked for one by one; `alive`: those that were given and not taken yet."""

    def __init__(self, count: int, size: int) -> None:
        self.sources = [draw(size, seed=seed) for seed in range(count)]
        self.given = 0

    def asked(self) -> list[Callable[[], torch.Tensor]]:
        def give(number: int) -> torch.Tensor:
            self.given = number + 1
            return self.sources[number]

        return [lambda number=number: give(number) for number in range(len(self.sources))]  # type: ignore[misc]


def brought(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    """As to a device that is another one."""

    def copy_of(self: DeviceReader, tensor: torch.Tensor) -> torch.Tensor:
        return filled(self, tensor)

    monkeypatch.setattr(DeviceReader, "copy_of", copy_of)
    return bring(weights.asked(), CPU)


def test_tensors_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(30, 57)
    got = list(brought(weights, monkeypatch))
    assert len(got) == 30 and all(map(torch.equal, got, weights.sources))


@pytest.mark.parametrize(("ahead_bytes", "most"), [(0, 1), (1000, 4), (10**9, 30)])
def test_only_so_many_bytes_are_read_ahead(
    ahead_bytes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_reads, "AHEAD_BYTES", ahead_bytes)
    weights = Weights(30, 100)  # 400 bytes each
    for number, _ in enumerate(brought(weights, monkeypatch), start=1):
        assert weights.given <= number + most - 1 if most > 1 else weights.given == number
    assert weights.given == 30


def test_what_is_on_the_device_or_lies_crosswise_is_taken_as_torch_takes_it() -> None:
    source: Any = draw(4, 6)
    with DeviceReader(CPU) as reader:
        assert reader.copy_of(source) is source
        crosswise = source.t()
        assert torch.equal(reader.copy_of(crosswise), crosswise)
