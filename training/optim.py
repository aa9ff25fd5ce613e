"""The optimizers: Muon for weight matrices, AdamW for the rest (or for everything).

Purpose: one `step` made of tensor operations alone, so that it can stand inside a CUDA graph.
Doesn't know: models beyond parameter names and shapes, schedules (the trainer fills `rate`).
Invariant: with `rate` 0 a step leaves every parameter as it is, bit for bit.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix; the update is
scaled to the size of an AdamW update (Liu et al., "Muon is Scalable for LLM Training", 2025, eq. 4).
"""

from dataclasses import dataclass

import torch
from torch import nn

from training.architectures import EMBEDDINGS
from training.settings import RecipeSettings

MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-9
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def orthogonalize(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices [N, rows, columns] -> nearly the nearest orthogonal ones, by Newton-Schulz in bf16."""
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


@dataclass
class MuonGroup:
    """Parameters of one shape and their stacked momentum."""

    parameters: list[torch.Tensor]
    momentum: torch.Tensor


@dataclass
class AdamGroup:
    """Parameters of one learning rate and weight decay, with both moments."""

    parameters: list[torch.Tensor]
    mean: list[torch.Tensor]
    square: list[torch.Tensor]
    lr: float
    weight_decay: float


class Optimizer:
    """Updates a model in place; `rate` is the schedule's factor on every learning rate."""

    def __init__(self, model: nn.Module, recipe: RecipeSettings) -> None:
        if recipe.optimizer not in ("muon", "adamw"):
            raise ValueError(f"unknown optimizer {recipe.optimizer!r}; choose muon or adamw")
        named = dict(model.named_parameters())
        matrices: list[torch.Tensor] = [
            p for name, p in named.items() if p.dim() == 2 and not name.endswith(EMBEDDINGS)
        ]
        others: list[torch.Tensor] = [
            p for name, p in named.items() if p.dim() != 2 or name.endswith(EMBEDDINGS)
        ]
        device = others[0].device
        self.recipe = recipe
        self.rate = torch.zeros((), device=device)
        self._count = torch.zeros((), device=device)
        self._adam = [_adam_group(others, recipe.lr_vector, 0.0)]
        self._muon: list[MuonGroup] = []
        if recipe.optimizer == "adamw":
            self._adam.append(_adam_group(matrices, recipe.lr_matrix, recipe.weight_decay))
            return
        for shape in dict.fromkeys(p.shape for p in matrices):
            same = [p for p in matrices if p.shape == shape]
            self._muon.append(MuonGroup(same, torch.zeros(len(same), *shape, device=device)))

    def reset(self) -> None:
        """Forget all moments, in place."""
        self._count.zero_()
        for group in self._muon:
            group.momentum.zero_()
        for adam in self._adam:
            torch._foreach_zero_(adam.mean + adam.square)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' gradients."""
        self._count.add_(1)
        for group in self._muon:
            self._step_muon(group)
        for adam in self._adam:
            self._step_adam(adam)

    def _step_muon(self, group: MuonGroup) -> None:
        gradient = torch.stack([_gradient(p) for p in group.parameters])
        group.momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
        update = orthogonalize(gradient.lerp(group.momentum, MUON_MOMENTUM))
        lr = self.rate * self.recipe.lr_matrix
        update = update * (lr * UPDATE_RMS * max(update.shape[1:]) ** 0.5)
        torch._foreach_mul_(group.parameters, 1 - lr * self.recipe.weight_decay)
        torch._foreach_sub_(group.parameters, list(update.unbind(0)))

    def _step_adam(self, group: AdamGroup) -> None:
        beta1, beta2 = ADAM_BETAS
        gradients = [_gradient(p) for p in group.parameters]
        torch._foreach_lerp_(group.mean, gradients, 1 - beta1)
        torch._foreach_mul_(group.square, beta2)
        torch._foreach_addcmul_(group.square, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(group.square)
        torch._foreach_mul_(scale, (1 - beta2**self._count).rsqrt())
        torch._foreach_add_(scale, ADAM_EPS)
        update = torch._foreach_div(group.mean, scale)
        lr = self.rate * group.lr
        torch._foreach_mul_(update, lr / (1 - beta1**self._count))
        if group.weight_decay:
            torch._foreach_mul_(group.parameters, 1 - lr * group.weight_decay)
        torch._foreach_sub_(group.parameters, list(update))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None, "step() before backward()"
    return parameter.grad


def _adam_group(parameters: list[torch.Tensor], lr: float, weight_decay: float) -> AdamGroup:
    mean = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    square = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    return AdamGroup(parameters, mean, square, lr, weight_decay)


def schedule(progress: float, recipe: RecipeSettings) -> float:
    """The factor on the learning rates at a progress from 0 to 1: rise, hold, linear fall to zero."""
    if progress < recipe.warmup:
        return progress / recipe.warmup
    hold = max(recipe.warmup, recipe.hold)
    return 1.0 if progress < hold else max(0.0, (1 - progress) / (1 - hold))
