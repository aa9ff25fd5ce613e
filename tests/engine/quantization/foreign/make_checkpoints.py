"""How the checkpoints in checkpoints/ were made: by the formats' own libraries, on a CPU.

    python make_checkpoints.py gptq                 with GPTQModel 7.7.0 importable
    python make_checkpoints.py awq                  with the sources of AutoAWQ 0.2.9 importable
    python make_checkpoints.py compressed-tensors   with compressed-tensors 0.20.0 importable

Each folder holds a llama of one layer as its library saves it, and `reference.safetensors`: the weights as
that library itself dequantizes them, under the names of the float model, `[N, K]`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER: Final = Path(__file__).parent / "checkpoints"
VOCABULARY: Final = 48
GROUP: Final = 16
CONFIG: Final = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    dtype="float16",
)  # fmt: skip


def float_model(dtype: torch.dtype = torch.float16) -> Any:
    """The model that every library quantizes; weights are wide enough to make greedy tokens differ."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def _linears(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def make_gptq() -> None:
    """GPTQModel's own calibration, packing and saving."""
    gptqmodel: Any = importlib.import_module("gptqmodel")
    variants: dict[str, dict[str, Any]] = {
        "gptq-4bit": dict(bits=4, group_size=GROUP, sym=True, desc_act=False, format="gptq"),
        "gptq-4bit-asym": dict(bits=4, group_size=GROUP, sym=False, desc_act=False, format="gptq"),
        "gptq-v2-act-order": dict(
            bits=4, group_size=GROUP, sym=False, desc_act=True, act_group_aware=False, format="gptq_v2"
        ),
        "gptq-8bit": dict(
            bits=8, group_size=-1, sym=False, desc_act=False, act_group_aware=False, format="gptq"
        ),
        "gptq-3bit": dict(bits=3, group_size=GROUP, sym=False, desc_act=False, format="gptq"),
        "gptq-2bit": dict(bits=2, group_size=GROUP, sym=True, desc_act=False, format="gptq_v2"),
    }
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (32,), generator=generator).tolist() for _ in range(16)]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "float"
        float_model().save_pretrained(source)
        _tokenizer().save_pretrained(source)
        for name, settings in variants.items():
            config = gptqmodel.QuantizeConfig(**settings)
            model = gptqmodel.GPTQModel.load(
                str(source), config, device="cpu", backend="torch", dtype=torch.float16
            )
            model.quantize(
                [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts], batch_size=1
            )
            saved = Path(temporary) / name
            model.save(str(saved))
            again = gptqmodel.GPTQModel.load(str(saved), device="cpu", backend="torch", dtype=torch.float16)
            _write(name, saved, {
                key: module.dequantize_weight().t() for key, module in _linears(again.model).items()
            })  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    """GPTQModel wants one."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")


def make_awq() -> None:
    """AutoAWQ's packing; its package imports what newer transformers lack, its layers do not."""
    folder = next(Path(p) / "awq" for p in sys.path if (Path(p) / "awq" / "modules").is_dir())
    for name, path in {"awq": folder, "awq.models": folder / "models"}.items():
        package: Any = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    gemm: Any = importlib.import_module("awq.modules.linear.gemm")
    packing: Any = importlib.import_module("awq.utils.packing_utils")
    settings: Any = importlib.import_module("awq.models._config")
    model = float_model()
    state = dict(model.state_dict())
    reference: dict[str, torch.Tensor] = {}
    for name, linear in _linears(model).items():
        groups = linear.weight.data.view(-1, GROUP)  # AwqQuantizer.pseudo_quantize_tensor, with zero points
        high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
        scales = (high - low).clamp(min=1e-5) / 15
        zeros = (-torch.round(low / scales)).clamp_(0, 15)
        shape = (linear.out_features, -1)
        linear.weight.data = (
            (torch.clamp(torch.round(groups / scales) + zeros, 0, 15) - zeros) * scales
        ).view(linear.weight.shape)
        packed = gemm.WQLinear_GEMM.from_linear(
            linear,
            4,
            GROUP,
            scales=scales.view(shape).t().contiguous(),
            zeros=zeros.view(shape).t().contiguous(),
        )
        state.pop(f"{name}.weight")
        for key in ("qweight", "qzeros", "scales"):
            state[f"{name}.{key}"] = getattr(packed, key)
        reference[name] = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).t()
    with tempfile.TemporaryDirectory() as temporary:
        save_file({k: v.contiguous() for k, v in state.items()}, Path(temporary) / "model.safetensors")
        config = model.config.to_dict()
        described = settings.AwqConfig(q_group_size=GROUP, modules_to_not_convert=["lm_head"])
        config["quantization_config"] = described.to_transformers_dict()
        (Path(temporary) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write("awq", Path(temporary), reference)


def make_compressed_tensors() -> None:
    """The library's own observers' arithmetic, compressor and config."""
    weights: dict[str, dict[str, Any]] = {
        "w4a16": dict(num_bits=4, strategy="group", group_size=GROUP),
        "w4a16-asym": dict(num_bits=4, strategy="group", group_size=GROUP, symmetric=False),
        "w8a16-asym": dict(num_bits=8, strategy="channel", symmetric=False),
        "w8a8-int8": dict(num_bits=8, strategy="channel"),
        "fp8-dynamic": dict(num_bits=8, type="float", strategy="channel"),
        "fp8-static": dict(num_bits=8, type="float", strategy="tensor"),
    }
    int8_activations = dict(num_bits=8, strategy="token", dynamic=True)
    fp8_activations = dict(num_bits=8, type="float")
    activations: dict[str, dict[str, Any]] = {
        "w8a8-int8": int8_activations,
        "fp8-dynamic": dict(fp8_activations, strategy="token", dynamic=True),
        "fp8-static": dict(fp8_activations, strategy="tensor"),
    }
    for name, args in weights.items():
        groups = {"group_0": dict(targets=["Linear"], weights=args, input_activations=activations.get(name))}
        _compress(f"ct-{name}", groups)
    _compress("ct-mixed", {
        "group_0": dict(targets=["re:.*self_attn.*"], weights=weights["w8a16-asym"]),
        "group_1": dict(targets=["Linear"], weights=weights["w4a16"]),
    })  # fmt: skip


def _compress(name: str, groups: dict[str, Any]) -> None:
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    helpers: Any = importlib.import_module("compressed_tensors.quantization.utils")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    model = float_model(torch.bfloat16)
    config = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for linear in _linears(model).values():
        args = linear.quantization_scheme.weights
        rows = linear.weight.data.float()
        size = {"group": args.group_size, "channel": rows.shape[1], "tensor": rows.numel()}[args.strategy]
        ranges = rows.reshape(-1, size)
        shape = linear.weight_scale.shape
        low, high = ranges.amin(1).view(shape), ranges.amax(1).view(shape)
        scale, zero = helpers.calculate_qparams(low, high, args)
        linear.weight_scale.data.copy_(scale)
        linear.weight_zero_point.data.copy_(zero)
        if hasattr(linear, "input_scale"):
            linear.input_scale.data.fill_(0.01)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        compressor.update_config(temporary)
        compressor.decompress_model(model)
        _write(name, Path(temporary), {key: module.weight for key, module in _linears(model).items()})


def _write(name: str, saved: Path, reference: dict[str, torch.Tensor]) -> None:
    """Keep what loading needs, in few bytes."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(saved / "model.safetensors", folder / "model.safetensors")
    config = (saved / "config.json").read_text().splitlines()
    kept = [line for line in config if "offload_to_disk_path" not in line]  # a folder that is gone
    (folder / "config.json").write_text("\n".join(kept) + "\n")
    tensors = {f"{key}.weight": value.detach().contiguous().clone() for key, value in reference.items()}
    save_file(tensors, folder / "reference.safetensors")
    sizes = {k: tuple(v.shape) for k, v in load_file(folder / "model.safetensors").items()}
    sys.stdout.write(f"{name}: {len(sizes)} tensors\n")


_MAKERS: Final[dict[str, Callable[[], None]]] = {
    "gptq": make_gptq,
    "awq": make_awq,
    "compressed-tensors": make_compressed_tensors,
}

if __name__ == "__main__":
    _MAKERS[sys.argv[1]]()
