"""A Llama decoder with grouped-query attention, for training.

Purpose: the same function as transformers' LlamaForCausalLM (parameter names too), plus dropout.
Doesn't know: caches, generation, quantization.
Invariant: embedding and output head are one matrix. Letters: B rows, T tokens, D hidden, V vocabulary,
    H heads, K key/value heads, E head width.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from training.settings import ModelSettings

ROPE_THETA = 10000.0
NORM_EPS = 1e-5


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain, computed in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D] float32."""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * self.weight


def rope_table(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles, float32 [T, E] each (halves repeated)."""
    frequency = ROPE_THETA ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(length).float(), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to [B, H, T, E]: element i turns with element i + E/2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; each key/value head serves H / K query heads."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = model.heads, model.kv_heads, model.head_dim
        size = model.hidden_size
        self.q_proj = nn.Linear(size, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(size, self.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(size, self.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.width).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.width).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.intermediate_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.intermediate_size, bias=False)
        self.down_proj = nn.Linear(model.intermediate_size, model.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with residual dropout."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = RMSNorm(model.hidden_size)
        self.mlp = MLP(model)
        self.dropout = model.dropout

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.layers))
        self.norm = RMSNorm(model.hidden_size)


class Llama(nn.Module):
    """The whole model; weights are drawn from the global random generator."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.settings = model
        self.model = Decoder(model)
        cos, sin = rope_table(model.max_positions, model.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (
                    (2 * model.layers) ** -0.5
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1.0
                )
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        cos, sin = self.get_buffer("cos")[: ids.shape[1]], self.get_buffer("sin")[: ids.shape[1]]
        x = F.dropout(self.model.embed_tokens(ids), self.settings.dropout, self.training)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
