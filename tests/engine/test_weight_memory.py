"""Memory of weights on a GPU: what torch's allocator and transformers are told, without either of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import modeling_utils

from memory_efficient_gpt import weight_memory
from memory_efficient_gpt.weight_memory import apart

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator was told; transformers' reservation tells it, too."""
    said: list[str] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append, raising=False)
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: said.append("reserved"))
    weight_memory._ask_before_warmup.cache_clear()
    return said


@pytest.fixture(autouse=True)
def _asked_anew() -> Any:
    yield
    weight_memory._ask_before_warmup.cache_clear()
    weight_memory._warn_once.cache_clear()


def reserve() -> None:
    """As transformers does before it loads."""
    model: Any = torch.nn.Linear(2, 2)
    modeling_utils.caching_allocator_warmup(model, {}, None)


def test_large_blocks_are_cut_again_afterwards_also_after_an_error(told: list[str]) -> None:
    with apart(CUDA):
        assert told == ["max_split_size_mb:32"]
    assert told.pop() == f"max_split_size_mb:{1 << 40}"
    with pytest.raises(RuntimeError, match="damaged"), apart(CUDA):
        raise RuntimeError("damaged")
    assert told[-1] == f"max_split_size_mb:{1 << 40}"


def test_the_outermost_of_several_decides(told: list[str]) -> None:
    with apart(CUDA):
        with apart(CUDA):
            pass
        assert len(told) == 1
    assert len(told) == 2


def test_transformers_reserves_one_block_for_all_weights_only_outside(told: list[str]) -> None:
    with apart(CUDA):
        reserve()
    assert "reserved" not in told
    reserve()
    assert told[-1] == "reserved"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_own_limit_stays(name: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8,max_split_size_mb:64")
    with apart(CUDA):
        pass
    assert told == []


def test_nothing_is_told_for_a_cpu(told: list[str]) -> None:
    with apart(CPU):
        assert told == []


def test_a_torch_that_can_not_be_told_is_named_once(
    told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    for _ in range(2):
        with apart(CUDA):
            pass
    assert [record.message for record in caplog.records] == [
        "This torch's allocator can't be told how to cut blocks: loading may leave holes."
    ]
