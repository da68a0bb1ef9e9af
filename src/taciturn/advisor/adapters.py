"""Which rank the update of a model has: the singular values of the pilot's mean update, layer by layer.

    captured(r) = sum over matrices of (s_1^2 + .. + s_r^2) / sum over matrices of |W|^2

Symbols: W [m, n] a tensor as a matrix (first axis by all others); s_i its singular values; r a rank; of `lora` W = B A.
A mean over messages holds noise, which has every rank, so captured(r) is too low, never too high.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taciturn.advisor.held import task_of
from taciturn.advisor.part import MEASURED, Part
from taciturn.advisor.pilot import Pilot
from taciturn.aggregation.low_rank import pairs_of
from taciturn.core.vector import Layout
from taciturn.experiment.experiment import Experiment
from taciturn.method import Method
from taciturn.partition import full, lora
from taciturn.partition.by_name import below, expand
from taciturn.tasks.models import causal, encoder

RANKS = (1, 2, 4, 8, 16)
KEEP = 0.9  # of the update's energy that a rank must capture
SHOWN = 12  # messages whose own spectrum is looked at; layers that are listed


def mean_of(pilot: Pilot) -> Tensor:
    """The mean message [d] float64, clients weighted as they are averaged."""
    counts = torch.bincount(pilot.client, minlength=len(pilot.weights)).to(torch.float64)
    return (pilot.weights / counts)[pilot.client] @ pilot.messages.to(torch.float64)


def matrices(layout: Layout, vector: Tensor) -> dict[str, Tensor]:
    """The tensors of a vector [d] that have two sides of at least 2, as matrices [m, n]."""
    views = {name: t.reshape(t.shape[0], -1) for name, t in layout.views(vector).items() if t.dim() > 1}
    return {name: w for name, w in views.items() if min(w.shape) > 1}


def energies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared singular values of each, the largest first.

    >>> energies({"w": torch.diag(torch.tensor([1.0, 3.0]))})["w"].tolist()
    [9.0, 1.0]
    """
    return {name: torch.linalg.svdvals(w.to(torch.float64)).square() for name, w in weights.items()}


def captured(spectra: Sequence[Tensor], rank: int) -> float:
    """The share of all energy that rank-r approximations hold."""
    total = sum(float(one.sum()) for one in spectra)
    return sum(float(one[:rank].sum()) for one in spectra) / total if total > 0 else 1.0


def least_rank(spectra: Sequence[Tensor], ranks: Sequence[int] = RANKS) -> int | None:
    """The least of the ranks that captures KEEP; None where none does."""
    return next((r for r in ranks if captured(spectra, r) >= KEEP), None)


def rank_part(pilot: Pilot, experiment: Experiment) -> Part:
    """Adapters: of which rank, or none."""
    if isinstance(experiment.method.partition, lora):
        return _of_adapters(pilot, experiment.method.partition)
    model = getattr(experiment.task, "model", None)
    if isinstance(model, (encoder, causal)) and isinstance(experiment.method.partition, full):
        return _to_adapt(pilot)
    return _from_scratch(pilot)


def _report(spectra: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> tuple[Any, Any]:
    """-> numbers, rows: captured by rank, in all and by layer, and values sent at it."""
    every = list(spectra.values())
    sent = {r: sum(4 * min(r * (m + n), m * n) for m, n in sizes.values()) for r in ranks}
    numbers = {
        "captured": {str(r): captured(every, r) for r in ranks}, "bytes": {str(r): sent[r] for r in ranks},
        "layers": {name: {str(r): captured([one], r) for r in ranks} for name, one in spectra.items()},
    }  # fmt: skip
    head = ("layer", *(f"rank {r}" for r in ranks))
    shown = sorted(spectra, key=lambda name: -float(spectra[name].sum()))[:SHOWN]
    rows = [(name, *(f"{100 * captured([spectra[name]], r):.0f} %" for r in ranks)) for name in shown]
    rows += [("all", *(f"{100 * captured(every, r):.0f} %" for r in ranks)), ("bytes", *(str(sent[r]) for r in ranks))]
    return numbers, (head, *rows)


def _of_adapters(pilot: Pilot, part: lora) -> Part:
    """The spectrum of B A with the mean message on top: all that the adapters have learnt."""
    split = pilot.curvature.work.split
    pairs = pairs_of(split.layout)
    if not pairs:
        return Part("rank", "as it is", "not looked at", {}, (f"share = {part.share!r} sends no pairs of factors.",))
    views = split.layout.views(pilot.x.to(torch.float64).cpu() + mean_of(pilot))
    products, sizes = {}, {}
    for name, (b, a) in pairs.items():
        left, right = views[b].flatten(1), views[a].flatten(1)
        left, right = (right.T, left.T) if left.shape[1] != right.shape[0] else (left, right)
        products[name] = left @ right
        sizes[name] = (left.shape[0], right.shape[1])
    spectra, ranks = energies(products), [r for r in RANKS if r < part.rank] + [part.rank]
    numbers, rows = _report(spectra, sizes, ranks)
    found = least_rank(list(spectra.values()), ranks) or part.rank
    said = [f"Of what adapters of rank {part.rank} have learnt so far, rank {found} holds {100 * KEEP:.0f} % or more."]
    if found == part.rank:
        said.append("All of the rank is in use; what a larger one would learn cannot be seen from within it.")
        return Part("rank", f"rank {part.rank}, as it is", MEASURED, numbers, tuple(said), rows)
    said.append("Early updates have a lower rank than late ones (docs/lora.md); ask again from a longer pilot (--pilot).")
    less = replace(part, rank=found, alpha=part.scale * found, ranks=())
    gain = numbers["bytes"][str(found)] / numbers["bytes"][str(part.rank)]
    return Part("rank", f"rank {found}", MEASURED, numbers, tuple(said), rows, gain, _shares(less))


def _to_adapt(pilot: Pilot) -> Part:
    """A pretrained model that is shared whole: what adapters in its linear layers would hold of the update."""
    task, layout, mean = task_of(pilot), pilot.curvature.work.split.layout, mean_of(pilot)
    head = expand(task.model, ("head",))
    linear = {f"{name}.weight" for name, module in task.model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {n: w for n, w in matrices(layout, mean).items() if n in linear and not below(n, head)}
    spectra, sizes = energies(chosen), {n: (w.shape[0], w.shape[1]) for n, w in chosen.items()}
    numbers, rows = _report(spectra, sizes, RANKS)
    beside = sum(float(t.square().sum()) for n, t in layout.views(mean).items() if n not in chosen and not below(n, head))
    frozen = beside / max(1e-300, float(mean.square().sum()))
    heads = sum(4 * t.numel() for n, t in layout.views(mean).items() if below(n, head))
    numbers |= {"frozen": frozen, "head_bytes": heads}
    found = least_rank(list(spectra.values()))
    said = [
        f"{100 * frozen:.0f} % of the update's energy is in tensors that adapters leave frozen (tables, norms, biases)."
    ]
    if found is None or not chosen:
        said.append(f"No rank up to {RANKS[-1]} holds {100 * KEEP:.0f} % of the update: adapters would be another method.")
        return Part("rank", "no adapters", MEASURED, numbers, tuple(said), rows)
    size = numbers["bytes"][str(found)] + heads
    said.append(f"Rank {found} and the head are {size} bytes a message, where the model has {4 * layout.d}.")
    said.append("What adapters learn in the end is not predicted: in bench/RESULTS.md rank 4 lost 0.8 points against all.")
    adapted = lora(rank=found, alpha=2.0 * found, also="head")
    return Part(
        "rank", f"adapters of rank {found}", MEASURED, numbers, tuple(said), rows, size / (4 * layout.d), _shares(adapted)
    )


def _from_scratch(pilot: Pilot) -> Part:
    """No adapters; what the codec `lowrank` would keep of single messages, which is measured instead."""
    layout = pilot.curvature.work.split.layout
    mean = matrices(layout, mean_of(pilot))
    few = pilot.messages[torch.linspace(0, len(pilot.messages) - 1, SHOWN).round().to(torch.int64)]
    own = [spectrum for u in few for spectrum in energies(matrices(layout, u)).values()]
    sizes = {name: (w.shape[0], w.shape[1]) for name, w in mean.items()}
    numbers, rows = _report(energies(mean), sizes, RANKS)
    numbers |= {"captured_of_messages": {str(r): captured(own, r) for r in RANKS}}
    said = ["The model is trained from scratch: its weights are not near what they will be, and adapters are not advised."]
    if not mean:
        return Part("rank", "no adapters", "not looked at", {}, (*said, "It has no matrix to take apart."))
    held = ", ".join(f"rank {r} {100 * captured(own, r):.0f} %" for r in RANKS)
    said.append(f"Single messages, as the codec lowrank would send them under error_feedback: {held} of their energy.")
    rows = (*rows, ("messages", *(f"{100 * captured(own, r):.0f} %" for r in RANKS)))
    return Part("rank", "no adapters", MEASURED, numbers, tuple(said), rows)


def _shares(part: lora) -> Callable[[Method], Method]:
    return lambda method: method.replace(partition=part)
