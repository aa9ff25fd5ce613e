"""What the fork server imports once, so that no worker has to.

Purpose: named in `set_forkserver_preload`; importing it is its whole effect.
Does not know: models, devices, workers.
Invariant: no CUDA call and no parallel region, so that the process has one thread and may fork.

The environment must already hold `PRELOAD_ENVIRONMENT` (memory_efficient_gpt.worker) when the fork
server starts: OpenMP and OpenBLAS read it once, as they are loaded.
"""

from importlib.util import find_spec

import tokenizers  # noqa: F401
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import memory_efficient_gpt.core
import memory_efficient_gpt.fusion.apply
import memory_efficient_gpt.fusion.merge  # noqa: F401

if torch.version.cuda is not None and find_spec("triton") is not None:
    from memory_efficient_gpt.triton_kernels.read_ahead import read_ahead

    read_ahead()
