"""A GPT-2 decoder (plain multi-head attention, learned positions), for training.

Purpose: the same function as transformers' GPT2LMHeadModel, with its parameter names and its
    [in, out] weight layout.
Doesn't know: caches, generation, quantization.
Invariant: embedding and output head are one matrix. Letters: B rows, T tokens, D hidden, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from training.settings import ModelSettings

NORM_EPS = 1e-5


class Affine(nn.Module):
    """x @ weight + bias with weight [in, out]."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out))
        self.bias = nn.Parameter(torch.zeros(size_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, in] -> [B, T, out]."""
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    """Causal attention with one key/value head per query head."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.heads = model.heads
        self.c_attn = Affine(model.hidden_size, 3 * model.hidden_size)
        self.c_proj = Affine(model.hidden_size, model.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows, length, size = x.shape
        parts = self.c_attn(x).view(rows, length, 3, self.heads, size // self.heads)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(dim=2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(rows, length, size))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """GELU feed-forward (tanh approximation)."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.c_fc = Affine(model.hidden_size, model.intermediate_size)
        self.c_proj = Affine(model.intermediate_size, model.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with residual dropout."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(model.hidden_size, eps=NORM_EPS)
        self.attn = Attention(model)
        self.ln_2 = nn.LayerNorm(model.hidden_size, eps=NORM_EPS)
        self.mlp = MLP(model)
        self.dropout = model.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + F.dropout(self.attn(self.ln_1(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.wte = nn.Embedding(model.vocab_size, model.hidden_size)
        self.wpe = nn.Embedding(model.max_positions, model.hidden_size)
        self.h = nn.ModuleList(Layer(model) for _ in range(model.layers))
        self.ln_f = nn.LayerNorm(model.hidden_size, eps=NORM_EPS)


class GPT2(nn.Module):
    """The whole model; weights are drawn from the global random generator."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.settings = model
        self.transformer = Decoder(model)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * model.layers) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        x = F.dropout(x, self.settings.dropout, self.training)
        for layer in self.transformer.h:
            x = layer(x)
        return F.linear(self.transformer.ln_f(x), self.transformer.wte.weight)
