"""Writes a trained model as an ordinary Hugging Face folder.

Purpose: config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
    tokenizer_config.json, chat_template.jinja and README.md, as `from_pretrained` expects them.
Doesn't know: training; it needs no transformers import, the files are plain JSON.
Invariant: a written folder is complete; weights are rounded to bf16 exactly once, here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training import chat
from training.llama import NORM_EPS, ROPE_THETA
from training.settings import ModelSettings

EOS_ID = chat.SPECIAL_TOKENS.index(chat.END_OF_TEXT)
PAD_ID = chat.SPECIAL_TOKENS.index(chat.PAD)
END_ID = chat.SPECIAL_TOKENS.index(chat.END)
GENERATION = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 256}


def llama_config(model: ModelSettings) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def gpt2_config(model: ModelSettings) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": model.hidden_size,
        "n_inner": model.intermediate_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": NORM_EPS,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """tokenizer_config.json: a fast tokenizer that adds nothing by itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": chat.END_OF_TEXT,
        "eos_token": chat.END_OF_TEXT,
        "unk_token": chat.END_OF_TEXT,
        "pad_token": chat.PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def export_folder(
    model: ModelSettings, weights: dict[str, torch.Tensor], tokenizer: Path, card: str, out: Path
) -> None:
    """Write the whole folder; `tokenizer` is the folder with tokenizer.json, `card` the README.md text."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    config = {"llama": llama_config, "gpt2": gpt2_config}[model.architecture](model)
    shared = {"vocab_size": model.vocab_size, "tie_word_embeddings": True, "dtype": "bfloat16", **ids}
    _write_json(out / "config.json", {**config, **shared})
    _write_json(out / "generation_config.json", {**ids, "eos_token_id": [EOS_ID, END_ID], **GENERATION})
    _write_json(out / "tokenizer_config.json", tokenizer_config(model.max_positions))
    shutil.copyfile(tokenizer / "tokenizer.json", out / "tokenizer.json")
    (out / "chat_template.jinja").write_text(chat.CHAT_TEMPLATE, encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")
    rounded = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()
    }
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})
