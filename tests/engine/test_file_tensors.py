"""Tensors of files that are read when they are asked for, and models that are made of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from memory_efficient_gpt import device_reads, loading
from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt.file_tensors import DTYPES, file_tensors, obstacle
from memory_efficient_gpt.loading import load_config, load_model, read_to_device
from memory_efficient_gpt.quantization import QuantizedModel
from tests.engine.architectures.configs import CASES

CPU = torch.device("cpu")
MODELS = ("llama", "gpt2", "phi3", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_reads, "_BUFFER_BYTES", 1000)
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    drawn = torch.randint(0, 2, (13, 70), generator=torch.Generator().manual_seed(0))
    own: dict[str, torch.Tensor] = {name: drawn.to(dtype) for name, dtype in DTYPES.items()}
    return own | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}


@pytest.fixture(scope="module")
def files(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    names = sorted(tensors)
    paths = [folder / "one.safetensors", folder / "two.safetensors"]
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, path)
    return paths


def test_tensors_of_every_type_are_those_of_the_files(
    files: list[Path], tensors: dict[str, torch.Tensor]
) -> None:
    assert obstacle(files) is None
    with file_tensors(files, CPU) as found:
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].get_shape() == list(tensor.shape)
            got = found[name][...]
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.float(), tensor.float())
        assert torch.equal(found["F32"][3:5], tensors["F32"][3:5])


def test_a_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"w": torch.zeros(3, dtype=torch.complex64)}, path)
    assert obstacle([path]) == "tensor w is of type C64"


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(5000)}, path)
    with file_tensors([path], CPU) as found:
        path.write_bytes(path.read_bytes()[:9000])
        with pytest.raises(CheckpointError, match=r"model\.safetensors has become shorter"):
            found["w"][...]


def plain(folder: Path, dtype: torch.dtype) -> Any:
    return load_model(folder, load_config(folder), dtype=dtype, device=CPU)


def assert_same(own: Any, other: Any) -> None:
    for ours, theirs in (
        (own.state_dict(), other.state_dict()),
        (dict(own.named_buffers()), dict(other.named_buffers())),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert own.config.to_dict() == other.config.to_dict()
    assert own.generation_config.to_dict() == other.generation_config.to_dict()
    assert own.name_or_path == other.name_or_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_one_that_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = CASES[name].model()
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    own, report = read_to_device(tmp_path, load_config(tmp_path), dtype, CPU)
    assert not any(report.values()), report
    assert_same(own, plain(tmp_path, dtype))


def test_a_folder_of_quantized_weights_is_the_one_that_transformers_loads(tmp_path: Path) -> None:
    source, folder = tmp_path / "float", tmp_path / "int4"
    CASES["llama"].model().save_pretrained(source)
    QuantizedModel.from_pretrained(str(source), scheme="int4", device="cpu").save_pretrained(folder)
    config = load_config(folder)
    from memory_efficient_gpt.quantization.checkpoint import register_format

    register_format()
    own, _ = read_to_device(folder, config, torch.float32, CPU)
    assert_same(own, plain(folder, torch.float32))


def test_where_it_can_not_be_done_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    CASES["llama"].model().save_pretrained(tmp_path)
    config = load_config(tmp_path)
    monkeypatch.setattr("memory_efficient_gpt.file_tensors.obstacle", lambda files: "no such thing here")
    with caplog.at_level(logging.WARNING):
        assert loading._read_if_possible(tmp_path, config, torch.float32, CPU) is None
    assert "files can't be read straight to cpu: no such thing here" in caplog.text


@pytest.mark.parametrize(
    "error", [CheckpointError("changed"), RuntimeError("CUDA out of memory"), ValueError("odd")], ids=str
)
def test_what_no_other_way_would_cure_is_raised(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    CASES["llama"].model().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "read_to_device", fail)
    with pytest.raises(type(error), match=str(error)):
        loading._read_if_possible(tmp_path, Any, torch.float32, CPU)  # type: ignore[arg-type]


def test_a_transformers_that_asks_more_of_a_tensor_is_told_and_reads_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise AttributeError("'FileTensor' object has no attribute 'stride'")

    CASES["llama"].model().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "read_to_device", fail)
    with caplog.at_level(logging.WARNING):
        assert loading._read_if_possible(tmp_path, Any, torch.float32, CPU) is None  # type: ignore[arg-type]
    assert "has no attribute 'stride'" in caplog.text
