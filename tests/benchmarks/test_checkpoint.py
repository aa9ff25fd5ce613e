"""The random model is the same model in both formats."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from benchmarks.peers.checkpoint import SHAPES, bytes_per_token, ensure_checkpoint, random_tensors


def test_bytes_per_token_are_all_matrices_but_the_input_embedding() -> None:
    shape = SHAPES["toy"]
    matrices = [
        tensor for name, tensor in random_tensors(shape) if tensor.ndim == 2 and "embed_tokens" not in name
    ]
    assert bytes_per_token(shape) == sum(tensor.nbytes for tensor in matrices)


def test_transformers_loads_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = ensure_checkpoint("toy", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    expected = dict(random_tensors(SHAPES["toy"]))
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_gguf_rows_of_each_head_alternate_between_the_halves() -> None:
    pytest.importorskip("gguf")
    export = importlib.import_module("benchmarks.peers.gguf_export")
    weight = torch.arange(8.0).view(8, 1)  # two heads of four rows
    assert export.interleave_halves(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
