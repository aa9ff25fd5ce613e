"""What a teacher says about every training token, computed once and kept.

Purpose: the teacher's most likely next tokens at every position of the train and chat streams, so that
    a student learns from a larger model at the price of a lookup; and the loss that mixes both.
Doesn't know: optimizers, schedules. Letters: B rows, T tokens, V vocabulary, C choices kept, N tokens.
Invariant: the weights of the true token and of the kept choices add up to 1 at every position.
"""

from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

CHOICES = 64


@dataclass(frozen=True)
class TeacherChoices:
    """Token ids int16 [N, C] and probabilities float16 [N, C]; row i is about token i + 1."""

    ids: torch.Tensor
    probabilities: torch.Tensor


def mixed_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    choices: tuple[torch.Tensor, torch.Tensor] | None,
    teacher_weight: float,
) -> torch.Tensor:
    """Mean loss from logits [B, T, V], true tokens [B, T] and the teacher's (ids, probabilities) [B, T, C].

    The probability that the teacher gives to tokens outside its kept choices goes to the true token.
    """
    logits = logits.float()
    norm = logits.logsumexp(-1)
    loss = norm - logits.gather(-1, targets[..., None])[..., 0]
    if choices is not None:
        ids, weights = choices[0], choices[1].float() * teacher_weight
        soft = (weights * (norm[..., None] - logits.gather(-1, ids))).sum(-1)
        loss = soft + (1 - weights.sum(-1)) * loss
    return loss.mean()


@torch.no_grad()
def teacher_choices(
    teacher: nn.Module, stream: torch.Tensor, length: int, rows: int = 64, compiled: bool = True
) -> TeacherChoices:
    """Run the teacher over a stream with windows of `length` that overlap by a quarter."""
    teacher.eval()
    forward = torch.compile(teacher, dynamic=False) if compiled else teacher
    total, keep = len(stream), length - length // 4
    ids = torch.zeros(total, CHOICES, dtype=torch.int16, device=stream.device)
    probabilities = torch.zeros(total, CHOICES, dtype=torch.float16, device=stream.device)
    starts = [*range(0, total - length, keep), total - length]
    rows = min(rows, len(starts))
    starts += [starts[-1]] * (-len(starts) % rows)  # one batch shape: one compilation
    offsets = torch.arange(length, device=stream.device)
    for index in tqdm(range(0, len(starts), rows), desc="teacher", mininterval=5):
        first = torch.tensor(starts[index : index + rows], device=stream.device)
        places = first[:, None] + offsets
        with torch.autocast(stream.device.type, dtype=torch.bfloat16):
            logits = forward(stream[places].long())
        skip = 0 if index == 0 else length // 4
        best = logits[:, skip:].float().softmax(-1).topk(CHOICES, dim=-1)
        ids[places[:, skip:]] = best.indices.to(torch.int16)
        probabilities[places[:, skip:]] = best.values.to(torch.float16)
    return TeacherChoices(ids, probabilities)
