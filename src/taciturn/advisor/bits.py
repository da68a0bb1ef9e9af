"""In which precision clients should train: what a round takes in each mode on the fleet, and what few bits cost.

Seconds are the fleet's clock, a step counted in each mode (experiment/simulated.py): a device without a kernel for bfloat16
does its products in float32. The cost of b bits is measured: the pilot's end model with Q_b of its weights (precision/
fake.py) on samples that are held out. Modes (precision/modes.py) end in a model of b bits; training itself is never done in
int8, so int8 kernels matter where the model is used: without them, and without a policy that asks for few bits, nothing is
gained from them. Symbols: b bits of the deployed model; P profiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from taciturn import precision
from taciturn.advisor.held import held_out, measured, task_of
from taciturn.advisor.part import MEASURED, Line, Part, keep, timing
from taciturn.advisor.pilot import Pilot
from taciturn.advisor.rank import weigh
from taciturn.codecs import quantize
from taciturn.core import random
from taciturn.core.rounding import applies
from taciturn.experiment.simulated import counted
from taciturn.method import Method
from taciturn.precision.forward import KNOBS
from taciturn.precision.modes import BITS
from taciturn.precision.policies import deployed_bits

POINT = 0.01  # of a metric that is a share, or of the value of one that is not, that quantizing may cost
SLOWER = 1.1  # times a round's seconds that training on quantized weights may take for all
FASTER = 0.9  # times a round's seconds in float32, below which bfloat16 is worth its rounding


def precision_part(pilot: Pilot, line: Line, codec: Any, up: float) -> Part:
    """float32, bfloat16, ptq, qat or coarse. codec, up: of the advised way up, and bytes of its messages."""
    work, fleet, policy = pilot.curvature.work, pilot.end.times.fleet, pilot.end.method.precision
    asked = deployed_bits(policy)
    shapes = [p.shape for p in work.task.model.parameters()]
    inner = sum(s.numel() for s in shapes if applies(s)) / max(1, sum(s.numel() for s in shapes))
    kernels = {name: [p.name for p in fleet.profiles if name in p.kernels] for name in ("bfloat16", "int8")}
    bits = asked or (8 if kernels["int8"] else 0)
    seconds, sent = _seconds(pilot, line, bits, up, bool(kernels["bfloat16"]))
    costs, note = _costs(pilot, inner)
    numbers = {
        "seconds": seconds, "bytes_up": sent, "quantized": inner, "cost": {str(b): c for b, c in costs.items()},
        "kernels": kernels, "bits": bits,
    }  # fmt: skip
    rows = (("mode", "seconds a round", "bytes up"), *((m, f"{s:.3g}", f"{sent[m]:.0f}") for m, s in seconds.items()))
    name = task_of(pilot).metrics[0].name if task_of(pilot).metrics else "loss"
    said = [f"{100 * inner:.0f} % of the weights are in layers with 16 features on both sides, which few bits apply to."]
    if costs:
        lost = ", ".join(f"{b} bits {c:+.3g}" for b, c in costs.items())
        said.append(f"Quantizing the pilot's end model changes {name} by: {lost} ({note}).")
    choice, change, gain, why = _chosen(pilot, line, bits, seconds, costs, codec)
    changed = change is not keep and change(pilot.end.method).precision != policy
    sure = f"seconds {line_word(line)}; accuracy of quantized weights {MEASURED}, that of qat and bfloat16 not"
    return Part("precision", choice, sure, numbers, (*said, *why), rows, gain, change if changed else keep)


def line_word(line: Line) -> str:
    """How the seconds are known."""
    return f"predicted by the clock for {line.told}"


def _seconds(pilot: Pilot, line: Line, bits: int, up: float, half: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Of a round, and bytes up, by mode; ptq and qat with the codec quantize of so many bits."""
    work, size, fleet = pilot.curvature.work, pilot.end.method.batch_size, pilot.end.times.fleet
    few = weigh(quantize(bits=bits, rounding="nearest", scale="channel"), pilot, random.key(0)) if bits else up
    modes = {"float32": ("", up)} | ({"bfloat16": ("bfloat16", up)} if half else {})
    modes |= {f"ptq{bits}": ("", few), f"qat{bits}": ("train", few)} if bits else {}
    seconds, sent = {}, {}
    for mode, (knob, message) in modes.items():
        operators = counted(work, size, [name == knob for name in KNOBS])
        steps = torch.tensor([[p.step_seconds(operators) for p in fleet.profiles]], dtype=torch.float64)
        seconds[mode] = timing(pilot, replace(line.clock, steps=steps), message, pilot.bytes_down).seconds
        sent[mode] = message
    return seconds, sent


def _costs(pilot: Pilot, inner: float) -> tuple[dict[int, float], str]:
    """What b bits change of the leading metric (of the loss where there is none) -> by bits; on which samples."""
    if not inner:
        return {}, ""
    held = held_out(pilot)
    if not held.places:
        return {}, ""
    name = task_of(pilot).metrics[0].name if task_of(pilot).metrics else "loss"
    plain = measured(pilot, held)
    found = {b: measured(pilot, held, b)[name] - plain[name] for b in sorted(BITS, reverse=True)}
    return found, f"{plain[name]:.3g} in float32, {plain['count']:.0f} samples, {held.note}"


def _worse(pilot: Pilot, change: float) -> float:
    """By how much a change of the leading metric is for the worse, in the unit of POINT."""
    metrics = task_of(pilot).metrics
    return -change if metrics and metrics[0].goal == "max" else change / max(1e-12, abs(pilot.loss))


def _chosen(
    pilot: Pilot, line: Line, bits: int, seconds: dict[str, float], costs: dict[int, float], codec: Any
) -> tuple[str, Callable[[Method], Method], float, tuple[str, ...]]:
    fleet, plain = pilot.end.times.fleet, seconds["float32"]
    if bits and costs:
        return _few(pilot, bits, seconds, costs, codec)
    half = seconds.get("bfloat16", plain)
    if half < FASTER * plain:
        everybody = all("bfloat16" in profile.kernels for profile in fleet.profiles)
        policy = precision.all("bfloat16") if everybody else precision.coarse(modes=("float32", "bfloat16"))
        why = f"Rounds in bfloat16 take {half / plain:.2f} of the time; what its rounding costs was not measured."
        return f"{_named(policy)}", lambda m: m.replace(precision=policy), half / plain, (why,)
    if not bits:
        why = "No device has int8 kernels and the method asks for no model of few bits: nothing is gained by fewer."
        return "float32", keep, 1.0, (why,)
    return "float32", keep, 1.0, ("Few bits apply to no layer of this model.",)


def _few(
    pilot: Pilot, bits: int, seconds: dict[str, float], costs: dict[int, float], codec: Any
) -> tuple[str, Callable[[Method], Method], float, tuple[str, ...]]:
    """The model will be used with so many bits: quantized after training, or trained on it by all, or by who has time."""
    lost, ratio = _worse(pilot, costs[bits]), seconds[f"qat{bits}"] / seconds[f"ptq{bits}"]
    if lost <= POINT:
        cost = f"{abs(100 * max(lost, 0.0)):.2g}"
        why = f"{bits} bits cost {cost} points here, so train in float32 and quantize at the end (taciturn export)."
        if (isinstance(codec, quantize) and codec.bits != bits) or hasattr(codec, "codec"):
            more = f"The fragment leaves float32: under ptq{bits} the codec quantize would send {bits} bits a value."
            return f"ptq{bits} (float32, then quantized)", keep, 1.0, (why, more)
        policy = precision.all(f"ptq{bits}")
        return f"ptq{bits}", lambda m: m.replace(precision=policy), 1.0, (why,)
    said = f"{bits} bits after training cost {100 * lost:.2g} points here; training on them takes {ratio:.2f} of a round."
    more = f"The codec quantize sends {bits} bits a value under these modes, whatever it is set to."
    if ratio <= SLOWER:
        whole = precision.all(f"qat{bits}")
        return f"qat{bits}", lambda m: m.replace(precision=whole), ratio, (said, more)
    some = precision.coarse(modes=(f"ptq{bits}", f"qat{bits}"))
    return _named(some), lambda m: m.replace(precision=some), 1.0, (said, "Who has time trains on them (coarse).", more)


def _named(policy: Any) -> str:
    """The policy in words."""
    return f"all({policy.mode})" if hasattr(policy, "mode") else f"{type(policy).__name__}({', '.join(policy.modes)})"
