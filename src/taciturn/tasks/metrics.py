"""Losses and metrics as sums that travel: one value a sample, so that padding and pooling change nothing.

Symbols: output [b, ..] of the model; target [b, ..]; value [b] float; of texts l tokens, V in the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

PADDING = -100  # the target of a token that is not to be predicted, as torch's cross-entropy has it


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over samples: `values(output, target)` gives [b]; `finish` is applied to the pooled mean.

    goal "max" (accuracy) or "min" (an error).
    """

    name: str
    values: Callable[[Any, Any], Tensor]
    goal: Literal["max", "min"] = "max"
    finish: Callable[[float], float] = float


def per_sample(loss: Callable[..., Tensor]) -> Callable[[Any, Any], Tensor]:
    """A loss of `torch.nn` or `torch.nn.functional`, or one of the user's -> one that gives [b].

    Modules and functions that take `reduction` are called with "none"; trailing axes are averaged. The loss that was given
    is not touched. Departure: class weights and ignored targets of torch's cross-entropy scale a sample's own value; the
    mean is still over all samples, where torch divides by the sum of the weights.
    """
    if hasattr(loss, "reduction"):
        raw = copy.copy(loss)
        raw.reduction = "none"
    else:
        try:
            takes = "reduction" in inspect.signature(loss).parameters
        except (TypeError, ValueError):
            takes = False
        raw = (lambda output, target: loss(output, target, reduction="none")) if takes else loss

    def values(output: Any, target: Any) -> Tensor:
        value = raw(output, target)
        return value.flatten(1).mean(1) if value.dim() > 1 else value

    return values


def next_token(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the l tokens of each sequence: logits [b, l, V], target [b, l] -> [b].

    Targets of `PADDING` do not count; a sequence of nothing else has 0. Departure: in the mean over a batch or a test set
    all sequences weigh alike, however many tokens each has.
    """
    losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PADDING, reduction="none")
    return losses.view(target.shape).sum(1) / (target != PADDING).sum(1).clamp(min=1)


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).float()


def _square(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def _absolute(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().flatten(1).mean(1)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


accuracy = Metric("accuracy", _accuracy)
mse = Metric("mse", _square, "min")
rmse = Metric("rmse", _square, "min", math.sqrt)
mae = Metric("mae", _absolute, "min")
perplexity = Metric("perplexity", next_token, "min", _exp)
