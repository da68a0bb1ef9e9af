"""What a mode costs in time on a device: a roofline of one training step, and its calibration.

    F = 2 T k i o  flops forward, 3 F a training step        M = e (T i + k i o + T o)  bytes forward, 3 M a step
    t(dtype) = max(3 F / pi, 3 M / beta) + operators overhead
    q = (12 k i o + 12 T i 1{inputs}) / beta                  fake quantization: read twice, write once, 4 bytes each
    T(m) = E ceil(n / B) sum over layers [t + 1{qat} q] + W b / 8 / up + W 4 / down

Symbols: T rows of a layer's product (batch x positions), i and o its input and output features, k positions of its kernel
(1: linear), e bytes of an element, pi [flop/s], beta [bytes/s]; W weights; E epochs, n samples, B samples of a batch. All
times are seconds. After FedHQ (arXiv 2505.11982): the idea of a hardware analysis; the formulas are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taciturn.core.errors import require
from taciturn.precision.modes import Mode

FUSED, EAGER = 12.0, 36.0  # bytes moved for each value that is fake-quantized: one kernel; operator after operator
SIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Layer:
    """T, i, o, k; operators: launched in a training step."""

    rows: int
    inputs: int
    outputs: int
    kernel: int = 1
    operators: int = 3

    @property
    def weights(self) -> int:
        """k i o."""
        return self.kernel * self.inputs * self.outputs


@dataclass(frozen=True)
class Device:
    """rate: flop/s by dtype; bandwidth: bytes/s of a copy; overhead: seconds to launch an operator; up, down: bytes/s."""

    rate: Mapping[str, float]
    bandwidth: float
    overhead: float = 0.0
    up: float = math.inf
    down: float = math.inf


def quantizing(values: int, bandwidth: float, moved: float = FUSED) -> float:
    """q: seconds of fake-quantizing so many values once, at bandwidth [bytes/s].

    >>> quantizing(1000, 12e9)
    1e-06
    """
    return moved * values / bandwidth


def step(layers: Sequence[Layer], device: Device, mode: Mode, inputs: bool = False, moved: float = FUSED) -> float:
    """Seconds of a training step. inputs: activations are quantized too. Errors: `ConfigError` without the dtype's rate."""
    dtype = mode.dtype
    require(dtype in device.rate, f"precision.cost: the device has no rate for {dtype}; it has {', '.join(device.rate)}")
    rate, size, total = device.rate[dtype], SIZE[dtype], 0.0
    for layer in layers:
        flops = 6.0 * layer.rows * layer.weights
        bytes_ = 3.0 * size * (layer.rows * (layer.inputs + layer.outputs) + layer.weights)
        total += max(flops / rate, bytes_ / device.bandwidth) + layer.operators * device.overhead
        if mode.trained:
            total += quantizing(layer.weights + layer.rows * layer.inputs * inputs, device.bandwidth, moved)
    return total


def seconds(layers: Sequence[Layer], device: Device, mode: Mode, steps: int, inputs: bool = False) -> float:
    """T(m) of a round of `steps` local steps: training, the upload at the mode's bits, the model's way down in float32."""
    weights = sum(layer.weights for layer in layers)
    line = weights * (mode.bits or 32) / 8 / device.up + weights * 4 / device.down
    return steps * step(layers, device, mode, inputs) + line


def overhead(
    rate: float, bandwidth: float, rows: int, outputs: int, kernel: int = 1, inputs: bool = False, moved: float = FUSED
) -> float:
    """Time of a quantization-aware step over a float one, - 1, where products decide: (c pi / 6 beta) (1 / T + 1 / (k o)).

    The second term only with quantized inputs.

    >>> round(overhead(88e9, 30e9, 32, 512, moved=EAGER), 2)
    0.55
    """
    return moved * rate / (6.0 * bandwidth) * (1.0 / rows + inputs / (kernel * outputs))


def calibrated(factor: float, observed: float, predicted: float, a: float = 0.3) -> float:
    """c <- (1 - a) c + a t_obs / t_pred, where t_pred is without c; a time is then predicted as c T(m).

    >>> calibrated(1.0, 3.0, 2.0)
    1.15
    """
    require(predicted > 0 and observed > 0, f"precision.cost: times above 0; got {observed=}, {predicted=}")
    return (1 - a) * factor + a * observed / predicted
