"""What should stay at home: how unlike the clients are, layer by layer, and whether heads of their own pay.

rho of a layer = between over within variance of its messages (law.py). The head is tried out where the pilot ended: with
all else fixed, its inputs are features z [n, f], and the head is fitted to them in three ways,

    shared   as the pilot left it, h0
    one      argmin over h of mean over all clients' samples of loss(h z, y)          + (mu / 2) |h - h0|^2
    own      argmin over h of mean over client i's samples of the same                + (mu / 2) |h - h0|^2

each of the last two at its best mu of three, by L-BFGS, so there is no step size to tune; and measured on samples that
neither was fitted to. `one` is what a shared head could be, so pilots that are not at their end do not favour `own`. With
skill = 1 - loss / loss of a constant:

    none         own is not better than one by two standard errors over the clients
    head         one has less than half of own's skill: no shared head can serve all, and sharing it harms what is below
    fine-tune    else: a shared model, and a few steps at home at the end

Source: docs/personal.md: FedAvg with fine-tuning was the best of eleven methods on three of five tasks, a personal head
(FedSim) on the one where clients name their classes differently, FedAPM on none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taciturn.advisor.held import Held, held_out, params_of, task_of
from taciturn.advisor.law import bootstrap, heterogeneity
from taciturn.advisor.part import MEASURED, Part
from taciturn.advisor.pilot import Pilot
from taciturn.core import random
from taciturn.core.types import Batch
from taciturn.partition import full, layers
from taciturn.partition.by_name import expand
from taciturn.tasks.built import BuiltTask

PULLS = (0.001, 0.01, 0.1)  # mu
HALF = 0.5
STEPS = 30  # iterations of L-BFGS
FEWEST = 3  # clients
NONE, FINE, HEAD = "no personal layers", "fine-tune at home at the end", "a personal head"


def by_layer(pilot: Pilot) -> dict[str, tuple[float, float, float]]:
    """rho of each module's parameters, with 90 % of a bootstrap."""
    layout, sent = pilot.curvature.work.split.layout, pilot.messages
    counts = torch.bincount(pilot.client, minlength=len(pilot.weights)).to(torch.float64)
    boot = bootstrap(pilot.client, pilot.weights, pilot.whole, random.key(0), 20)
    places: dict[str, list[Tensor]] = {}
    for name, place in layout.views(torch.arange(layout.d)).items():
        places.setdefault(name.rpartition(".")[0] or name, []).append(place.flatten())
    found = {}
    for name, parts in places.items():
        part = sent[:, torch.cat(parts)]
        means = torch.zeros(len(counts), part.shape[1]).index_add_(0, pilot.client, part) / counts.float().unsqueeze(1)
        found[name] = heterogeneity(part, pilot.client, means, boot, counts)
    return found


def personal_part(pilot: Pilot) -> Part:
    """none, fine-tune at the end, or a head of each client's own."""
    rho = by_layer(pilot)
    unlike = sorted(rho, key=lambda name: -rho[name][0])
    numbers: dict[str, Any] = {"rho": {name: list(values) for name, values in rho.items()}}
    rows = [("layer", "rho (90 %)")]
    rows += [(name, "{:.2g} ({:.2g} {:.2g})".format(*rho[name])) for name in unlike[:12]]
    said = [
        f"Clients differ most in {unlike[0]} (rho = {rho[unlike[0]][0]:.2g}: between over within variance of messages)."
    ]
    tried = _tried(pilot)
    if isinstance(tried, str):
        return Part("personal", "as it is", f"rho {MEASURED}; heads not tried", numbers, (*said, tried), tuple(rows))
    losses, metrics, constant, note = tried
    choice, gap, error = judged(losses, constant)
    named = {name: float(loss.mean()) for name, loss in losses.items()}
    numbers |= {"loss": named, "constant": constant, "gap": gap, "gap_error": error, "clients": len(losses["own"])}
    numbers |= {"metric": metrics}
    leading = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    said.append(
        f"Heads fitted on what the pilot's layers give, for {len(losses['own'])} clients on {note}: loss "
        + ", ".join(f"{name} {value:.3g}" for name, value in named.items())
        + f", a constant {constant:.3g}"
        + (f"; {_metric(task_of(pilot))}: {leading}." if metrics else ".")
    )
    better, worse = ("heads of their own", "one for all") if gap > 0 else ("one head for all", "those of their own")
    said.append(
        f"{better.capitalize()} beat{'s' * (gap <= 0)} {worse} by {abs(gap):.2g} +- {error:.2g} (one standard error)."
    )
    said += _words(choice)
    change = layers(personal="head")
    sure = f"{MEASURED}: heads on fixed layers, not a training run; what follows from it: rule of thumb (docs/personal.md)"
    if choice == HEAD:
        return Part("personal", choice, sure, numbers, tuple(said), tuple(rows), 1.0, lambda m: m.replace(partition=change))
    return Part("personal", choice, sure, numbers, tuple(said), tuple(rows))


def judged(losses: dict[str, Tensor], constant: float) -> tuple[str, float, float]:
    """Losses of each client [S] by head, and of a constant -> the choice, mean gap one - own, its standard error.

    >>> judged({"one": torch.tensor([2.0, 2.1, 2.2]), "own": torch.tensor([0.1, 0.3, 0.2])}, 2.3)[0]
    'a personal head'
    """
    gaps = (losses["one"] - losses["own"]).to(torch.float64)
    gap, error = float(gaps.mean()), float(gaps.std()) / math.sqrt(len(gaps))
    one, own = (1 - float(losses[name].mean()) / constant for name in ("one", "own"))
    if not gap > 2 * error or gap <= 0.0:
        return NONE, gap, error
    return (HEAD if one < HALF * own else FINE), gap, error


def _words(choice: str) -> list[str]:
    if choice == NONE:
        return ["Heads of their own are no better that this sample could tell: nothing personal is advised."]
    if choice == FINE:
        return [
            "A shared head serves all, and a few steps at home at the end still pay: train the method as it is, then "
            "methods.local from its model (bench/fedapm.py does it). FedAPM was the best nowhere (docs/personal.md)."
        ]
    return ["One head for all has less than half of the skill of heads of their own: clients label differently."]


def _metric(task: BuiltTask) -> str:
    return task.metrics[0].name if task.metrics else "loss"


# --------------------------------------------------------------------------------------------------------- the trial


def _tried(pilot: Pilot) -> tuple[dict[str, Tensor], dict[str, float], float, str] | str:
    """-> losses of each client by head, the leading metric by head, loss of a constant, whose samples; or why not."""
    task, split, part = task_of(pilot), pilot.curvature.work.split, pilot.end.method.partition
    name = next(iter(expand(task.model, ("head",))))
    module = task.evaluated.get_submodule(name) if name in dict(task.evaluated.named_modules()) else None
    shared = [n for n in split.layout.names if n == name or n.startswith(f"{name}.")]
    if not isinstance(part, full):
        return f"The partition is {type(part).__name__}; heads are tried where all is shared."
    if len(shared) == len(split.layout.names):
        return "The head is the whole model: to keep it at home is to share nothing."
    if not isinstance(module, nn.Linear) or module.weight.shape[0] * module.weight.shape[1] > 200_000:
        return f"The last layer ({name}) is no linear layer of at most 200,000 weights, so no head was tried."
    held = held_out(pilot)
    if len(held.places) < FEWEST:
        return f"{len(held.places)} clients have enough samples for a trial; it takes {FEWEST}."
    learn = [_features(pilot, task, name, place, batch) for place, batch in zip(held.places, held.learn, strict=True)]
    hold = [_features(pilot, task, name, place, batch) for place, batch in zip(held.places, held.hold, strict=True)]
    if any(one is None for one in (*learn, *hold)):
        return f"The model's output is not that of its last layer ({name}), so no head was tried."
    start = torch.cat(
        [module.weight.detach(), *([module.bias.detach().unsqueeze(1)] if module.bias is not None else [])], 1
    )
    start = _weights(pilot, name, start)
    return _compared(task, start, learn, hold, held)  # type: ignore[arg-type]


def _weights(pilot: Pilot, name: str, like: Tensor) -> Tensor:
    """h0 [o, f] or, with a bias as its last column, [o, f + 1]."""
    params = params_of(pilot, 0)
    bias = params.get(f"{name}.bias")
    found = torch.cat([params[f"{name}.weight"], *([bias.unsqueeze(1)] if bias is not None else [])], 1)
    return found.detach().to(like)


def _features(pilot: Pilot, task: BuiltTask, name: str, place: int, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """(z [n, f] with a column of ones where there is a bias, y [n, ..]); None if the output is not the head's."""
    seen: list[Tensor] = []
    module, params = task.evaluated.get_submodule(name), params_of(pilot, place)
    hook = module.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    try:
        with torch.no_grad():
            output = task.program.output(task.evaluated, params, task.program.cast(batch))
    finally:
        hook.remove()
    bias = params.get(f"{name}.bias")
    if len(seen) != 1 or seen[0].dim() != 2 or not isinstance(output, Tensor):
        return None
    if not torch.equal(output, F.linear(seen[0], params[f"{name}.weight"], bias)):
        return None
    ones = [seen[0].new_ones(len(seen[0]), 1)] if bias is not None else []
    return torch.cat([seen[0], *ones], 1), task.program.cast(batch)["target"]


def _compared(
    task: BuiltTask,
    start: Tensor,
    learn: Sequence[tuple[Tensor, Tensor]],
    hold: Sequence[tuple[Tensor, Tensor]],
    held: Held,
) -> tuple[dict[str, Tensor], dict[str, float], float, str]:
    one_z, one_y = torch.cat([z for z, _ in learn]), torch.cat([y for _, y in learn])
    heads: dict[str, list[Tensor]] = {"shared": [start] * len(learn)}
    ways: dict[str, Callable[[float], list[Tensor]]] = {
        "one": lambda mu: [fitted(task, start, one_z, one_y, mu)] * len(learn),
        "own": lambda mu: [fitted(task, start, z, y, mu) for z, y in learn],
    }
    for name, way in ways.items():
        tries = [way(mu) for mu in PULLS]
        heads[name] = min(tries, key=lambda found: float(_losses(task, found, hold).mean()))
    losses = {name: _losses(task, found, hold) for name, found in heads.items()}
    constant = float(_losses(task, [_constant(start, one_y)] * len(hold), hold, flat=True).mean())
    return (
        losses,
        {name: _leading(task, found, hold, held) for name, found in heads.items() if task.metrics},
        constant,
        held.note,
    )


def fitted(task: BuiltTask, start: Tensor, z: Tensor, y: Tensor, mu: float) -> Tensor:
    """argmin over h [o, f] of mean loss(z h', y) + (mu / 2) |h - h0|^2, by L-BFGS from h0."""
    h = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([h], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = task.values(z @ h.T, y).mean() + mu / 2 * (h - start).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return h.detach()


def _losses(task: BuiltTask, heads: Sequence[Tensor], data: Sequence[tuple[Tensor, Tensor]], flat: bool = False) -> Tensor:
    """Mean loss of each client [S]; flat: heads are outputs [o], the same for all samples."""
    with torch.no_grad():
        outputs = [h.expand(len(z), -1) if flat else z @ h.T for h, (z, _) in zip(heads, data, strict=True)]
        return torch.stack([task.values(out, y).mean() for out, (_, y) in zip(outputs, data, strict=True)]).double()


def _constant(start: Tensor, y: Tensor) -> Tensor:
    """The output [o] of a model that knows only how often each class is, or the mean target."""
    if y.is_floating_point():
        return y.reshape(len(y), -1).mean(0).expand(len(start))
    return (torch.bincount(y.flatten(), minlength=len(start)) + 1.0).log()


def _leading(task: BuiltTask, heads: Sequence[Tensor], data: Sequence[tuple[Tensor, Tensor]], held: Held) -> float:
    """The leading metric, pooled over the clients' held-out samples."""
    total: dict[str, float] = {}
    for h, (z, _), batch in zip(heads, data, held.hold, strict=True):
        with torch.no_grad():
            sums = task.sums(z @ h.T, batch)
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    return task.pool(total)[task.metrics[0].name]
