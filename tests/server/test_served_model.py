"""A model's tokenizer is loaded once, by whoever comes first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.errors import LoadFailedError
from memory_efficient_gpt_server.models import ServedModel
from tests.server.registry.fake_engines import FakeHost


def model(source: object) -> ServedModel:
    registry = FakeHost().make()
    name = next(iter(registry.models))
    return ServedModel(name, registry.engine(name), source, registry=registry)  # type: ignore[arg-type]


async def test_all_who_ask_at_once_share_one_load(tokenizer: Tokenizer) -> None:
    loads = []

    def load() -> Tokenizer:
        time.sleep(0.02)  # the others ask meanwhile
        loads.append(1)
        return tokenizer

    served = model(load)
    await asyncio.gather(*(served.prepare() for _ in range(20)))
    assert loads == [1] and served.tokenizer is tokenizer


async def test_after_a_failure_the_next_one_tries_again(tokenizer: Tokenizer) -> None:
    answers: Iterator[CheckpointError | Tokenizer] = iter([CheckpointError("damaged"), tokenizer])

    def load() -> Tokenizer:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    served = model(load)
    with pytest.raises(LoadFailedError, match="damaged"):
        await served.prepare()
    await served.prepare()
    assert served.tokenizer is tokenizer
