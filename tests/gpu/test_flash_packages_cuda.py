"""FlashAttention's packages, where they are installed, against our own kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.attention.context import AttentionOptions
from memory_efficient_gpt.attention.flash_packages import (
    FlashPackage,
    FlashPrompts,
    TorchFlash,
    installed_packages,
)
from memory_efficient_gpt.attention.prompt_choice import Trial, choose_prompt_kernels, usable_package
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.triton import TritonBackend
from memory_efficient_gpt.attention.whole_prompts import CudnnPrompts
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from tests.engine.attention.oracle import Shape, make_step
from tests.engine.attention.test_torch_backend import TOLERANCES
from tests.gpu.test_triton_attention import on_device

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
PACKAGES = [*installed_packages()[0], TorchFlash()]


def trial(dim: int = 128, block_size: int = 64) -> Trial:
    layer = LayerKV("layer", 2, dim, dim, 8, window=100, softcap=30.0)
    return Trial(TritonBackend(), [layer], block_size, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_its_results_are_those_of_our_kernels(package: FlashPackage, dim: int, block_size: int) -> None:
    kernel = usable_package(package, trial(dim, block_size))
    if isinstance(kernel, str):
        pytest.skip(kernel)
    lens, contexts = [1, 577, 1, 300], [300, 577, 5, 300]
    if kernel.pages:
        contexts[3] = 1000
    step = make_step(
        TorchBackend(), lens, contexts, shape=Shape(8, 2, key_dim=dim, value_dim=dim),
        dtype=torch.bfloat16, block_size=block_size,
    )  # fmt: skip
    on_device(step)
    options = AttentionOptions(scale=dim**-0.5)
    own = step.run(TritonBackend(), options)
    got = step.run(TritonBackend(prompt_kernels=[kernel]), options)
    assert not torch.equal(got, own), "nothing was computed otherwise"
    assert float((got - own).abs().max()) < TOLERANCES[torch.bfloat16]


def test_what_is_chosen_is_told() -> None:
    for cudnn in (None, CudnnPrompts(128)):
        kernels, notes = choose_prompt_kernels(trial(), cudnn)
        assert (cudnn in kernels) == (cudnn is not None)
        used = [kernel.name for kernel in kernels if isinstance(kernel, FlashPrompts)]
        assert all(any(name in note for note in notes) for name in used)
