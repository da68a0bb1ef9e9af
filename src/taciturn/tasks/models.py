"""Small models by name, for recipes and the command line; users bring their own `nn.Module`.

Symbols: sample: one input without the batch axis; outputs: classes or regression values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taciturn.core.errors import DataError, require
from taciturn.tasks.pretrained import causal, encoder


@dataclass(frozen=True, slots=True)
class linear:
    """One linear layer on the flattened input."""

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """-> nn.Module for inputs of the sample's shape."""
        return nn.Sequential(nn.Flatten(), nn.Linear(sample.numel(), outputs))


@dataclass(frozen=True, slots=True)
class mlp:
    """Fully connected layers with ReLU (and dropout) on the flattened input."""

    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """-> nn.Module for inputs of the sample's shape."""
        widths = (sample.numel(), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(self.dropout)] if self.dropout else [])]
        return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


@dataclass(frozen=True, slots=True)
class cnn:
    """Two convolutions (5x5, padded) with ReLU and 2x2 max-pooling, one hidden layer: the CNN of LEAF and McMahan et al."""

    channels: tuple[int, int] = (32, 64)
    hidden: int = 512

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """-> nn.Module for images [c, h, w]. Errors: `DataError` for other shapes."""
        if sample.dim() != 3 or min(sample.shape[1:]) < 4:
            raise DataError(f"model cnn takes images [channels, height, width] of 4 x 4 or more; got {tuple(sample.shape)}")
        c, h, w = sample.shape
        first, second = self.channels
        features = (
            nn.Conv2d(c, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        wide = second * (h // 4) * (w // 4)
        return nn.Sequential(*features, nn.Linear(wide, self.hidden), nn.ReLU(), nn.Linear(self.hidden, outputs))


class Temporal(nn.Module):
    """Convolutions over time, then the mean over time: windows [t, features] -> outputs."""

    def __init__(self, features: int, channels: tuple[int, ...], kernel: int, outputs: int) -> None:
        super().__init__()
        widths = (features, *channels)
        pairs = zip(widths, channels, strict=False)
        self.stem = nn.ModuleList(nn.Conv1d(a, b, kernel, padding=kernel // 2) for a, b in pairs)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, features] -> [b, outputs]."""
        x = x.transpose(1, 2)
        for convolution in self.stem:
            x = torch.relu(convolution(x))
        pooled: Tensor = self.head(x.mean(-1))
        return pooled


@dataclass(frozen=True, slots=True)
class temporal:
    """Convolutions over time with ReLU, the mean over time, a linear head: for sensor windows [t, features]."""

    channels: tuple[int, ...] = (32, 32)
    kernel: int = 5

    def __post_init__(self) -> None:
        require(self.kernel % 2 == 1, f"temporal: an odd kernel; got {self.kernel}")

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """-> nn.Module for windows [t, features]. Errors: `DataError` for other shapes."""
        if sample.dim() != 2:
            raise DataError(f"model temporal takes windows [time, features]; got {tuple(sample.shape)}")
        return Temporal(sample.shape[1], self.channels, self.kernel, outputs)


__all__ = ["causal", "cnn", "encoder", "linear", "mlp", "temporal"]
