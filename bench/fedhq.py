"""Hybrid precision, after FedHQ (arXiv 2505.11982; the paper's own numbers cannot be verified): what its parts cost.

Allocator: 300 random instances of up to 6 clients and 4 modes with masks, beside brute force; milliseconds of CPU time for
1000 clients and 4 modes, median. Step: forward, backward, SGD, one thread; quantization-aware over float, median ratio
of CPU seconds of steps that take turns: lean (weights of 4 bits, then 8-bit inputs too), and the same weights through
`torch.fake_quantize_per_channel_affine`. Cost model: the closed form for the same weights, with rate and bandwidth measured
here, 36 bytes a weight (operator after operator).

Federations: digits on 24 clients (Dirichlet 0.3), 12 a round, MLP 64-64, 30 local steps of 10 samples, fleet `mixed`,
uploads of b bits with error feedback, 8 bits down. Policies: float32 (deployed in float), all PTQ, all QAT, that with
inputs of 8 bits, `coarse`, `coarse_fine` (the hybrid), and a random hybrid with its share of QAT. Of the deployed model (b
bits), accuracy is a mean over five rounds: the last ones, or those in which it first reaches the target of 80 %. Times are
simulated; ratios and differences are of means over seeds, null where a seed misses the target. Of all QAT also the time
that the library's fake quantization would take: the same rounds, with a step as much longer as it was measured here on
that model. The keys without "_2_bits" are at b = 3.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import taciturn
from bench.common import arguments, finish, mean_spread
from taciturn import Experiment, Method, codecs, fleet, participation, precision, solvers, sync
from taciturn.core import random
from taciturn.core.broadcast import Broadcast
from taciturn.core.rounding import applies, levels
from taciturn.engines.memory import keep_freed_memory
from taciturn.experiment.runner import prepare
from taciturn.precision import cost, fake
from taciturn.precision.allocate import coarse, objective
from taciturn.precision.modes import mode
from taciturn.tasks import data
from taciturn.tasks.models import mlp
from taciturn.tasks.spec import TaskSpec

BITS = 4
TARGET, LAST, ROUNDS = 0.8, 5, 30  # of the federations


def instance(seed: int, clients: int, modes: int) -> tuple[Tensor, Tensor]:
    """Times [s] with masks, and penalties: [clients, modes]; each client can run its first mode at least."""
    key = random.key(seed)
    times, penalties, mask = (random.uniform(random.fold(key, name), clients, modes).double() for name in "tdm")
    return torch.where((mask < 0.3) & (torch.arange(modes) > 0), torch.inf, times), penalties


def brute(times: Tensor, penalties: Tensor, lam: float) -> float:
    """The least J of all assignments."""
    clients, modes = times.shape
    every = torch.tensor(list(itertools.product(range(modes), repeat=clients)))
    return float((times.mT.gather(0, every).max(1).values + lam * penalties.mT.gather(0, every).sum(1)).min())


def allocator() -> dict[str, float]:
    """Instances that differ from brute force, and milliseconds for 1000 clients."""
    wrong = 0
    for seed in range(300):
        times, penalties = instance(seed, 1 + seed % 6, 1 + seed % 4)
        lam = 0.05 * (seed % 40)
        found = coarse(times, penalties, lam, 1.0)
        again = objective(times, penalties, found.modes, lam, 1.0)
        wrong += abs(again.objective - brute(times, penalties, lam)) > 1e-12
    times, penalties = instance(0, 1000, 4)
    took = [timed(lambda: coarse(times, penalties, 1.0, 1.0)) for _ in range(30)]
    return {"mismatches": wrong, "ms_1000_clients": median(took) * 1e3}


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


class Encoder(nn.Module):
    """Transformer encoder over vectors."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(block, layers, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, width] -> [b, 10]."""
        return self.head(self.body(x).mean(1))


def models(quick: bool) -> dict[str, tuple[nn.Module, Tensor, list[cost.Layer]]]:
    """Model, input, and the layers whose weights are quantized."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        cnn = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 10),
        )  # fmt: skip
        blocks = 2 if quick else 6
        encoder = Encoder(blocks, 384)
        rows = 16 * 64
        attention = [cost.Layer(rows, 384, n) for n in (1152, 384, 1536)] + [cost.Layer(rows, 1536, 384)]
        return {
            "mlp": (mlp, torch.randn(32, 784), [cost.Layer(32, 784, 512), cost.Layer(32, 512, 512)]),
            "cnn": (
                cnn, torch.randn(32, 3, 32, 32), [cost.Layer(32 * 1024, 32, 64, 9), cost.Layer(32 * 256, 64, 128, 9)],
            ),
            "federation": (digits_mlp(), torch.randn(10, 64), [cost.Layer(10, 64, 64), cost.Layer(10, 64, 64)]),
            "transformer": (encoder, torch.randn(16, 64, 384), attention * blocks),
        }  # fmt: skip


def library(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights through the library's own fake quantization."""
    top, out = levels(BITS), {}
    for name, w in tensors.items():
        out[name] = w
        if applies(w.shape):
            scale = w.detach().flatten(1).abs().amax(1) / top
            out[name] = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros_like(scale).int(), 0, -top, top)
    return out


def stepper(model: nn.Module, x: Tensor, way: str) -> Callable[[], None]:
    """One training step: forward, backward, SGD."""
    tensors = {name: t.detach().clone().requires_grad_() for name, t in model.named_parameters()}
    target, bits = torch.arange(len(x)) % 10, torch.tensor(levels(BITS))

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        seen = tensors
        if way == "library":
            seen = library(tensors)
        elif way != "float":  # as client.py: the gradient is taken at Q(w)
            with torch.no_grad():
                seen = {name: t.requires_grad_() for name, t in fake.lowered(tensors, bits).items()}
        output = torch.func.functional_call(model, seen, (x,))
        return F.cross_entropy(output, target), tensors if way == "library" else seen

    def step() -> None:
        if way == "inputs":
            with fake.inputs(torch.tensor(127)):
                value, seen = loss()
        else:
            value, seen = loss()
        gradients = torch.autograd.grad(value, list(seen.values()))
        with torch.no_grad():
            for t, g in zip(tensors.values(), gradients, strict=True):
                t.sub_(g, alpha=1e-4)

    return step


def turns(one: list[float], other: list[float]) -> float:
    """Median ratio of two that took turns: what slows a machine for a while slows both."""
    return median(a / b for a, b in zip(one, other, strict=True))


def machine_rates() -> cost.Device:
    """Rate of a float32 product of 512 and bandwidth of a copy of 1 MB, medians."""
    a, big = torch.randn(512, 512), torch.randn(1 << 17)
    out, copy = torch.empty_like(a), torch.empty_like(big)
    product = median(timed(lambda: torch.mm(a, a, out=out)) for _ in range(30))
    moved = median(timed(lambda: [copy.copy_(big) for _ in range(64)]) for _ in range(30)) / 64
    return cost.Device({"float32": 2 * 512**3 / product}, 2 * 4 * len(big) / moved)


def overheads(quick: bool) -> dict[str, dict[str, float]]:
    """Step time over that of the float step, by model."""
    device, found = machine_rates(), {}
    for name, (model, x, layers) in models(quick).items():
        steps = {way: stepper(model, x, way) for way in ("float", "lean", "inputs", "library")}
        rounds = {"mlp": 400, "cnn": 40, "federation": 800, "transformer": 24}[name] // (2 if quick else 1)
        took: dict[str, list[float]] = {way: [] for way in steps}
        for turn in range(rounds + 2):
            for way, step in steps.items():
                seconds = timed(step)
                if turn >= 2:
                    took[way].append(seconds)
        plain = median(took["float"])
        aware, without = (cost.step(layers, device, mode(m), moved=cost.EAGER) for m in (f"qat{BITS}", "float32"))
        row = {f"{way} / float": turns(took[way], took["float"]) for way in ("lean", "inputs", "library")}
        found[name] = {"float ms": plain * 1e3} | row | {"model of cost": aware / without}
    return found


# -------------------------------------------------------------------------------------------------------- federations


def clock() -> dict[str, float]:
    """Simulated seconds of a step in each way over a plain one, in the federation: on the reference device, in bfloat16
    also where it has a kernel four times as fast; and what 36 bytes a weight alone give.
    """
    modes = precision.fixed(modes=("qat3", "bfloat16")), precision.all("qat3", inputs=8)
    found: dict[str, float] = {}
    for device in (fleet.Profile(), fleet.Profile("bfloat16", bfloat16=200.0)):
        for policy in modes:
            world = fleet.Fleet((device,))
            run = prepare(federation(3, policy, 0).replace(fleet=world))
            facts = run.times.facts()
            (step,) = facts["step_seconds"]
            kernel = " with a kernel" if device.bfloat16 else ""
            ways = {name: seconds / step for name, (seconds,) in facts["way_seconds"].items()}
            found |= {name + kernel * (name == "bfloat16"): ratio for name, ratio in ways.items()}
            weights = sum(t.numel() for t in run.task.model.parameters() if fake.applies(t.shape))
            found["36 bytes a weight"] = 1 + cost.quantizing(weights, device.bandwidth * 1e9, cost.EAGER) / step
    return found


def digits_mlp() -> nn.Module:
    """The model of the federations, on 64 pixels."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def federation(bits: int, policy: Any, seed: int) -> Experiment:
    """One federation."""
    codec = codecs.error_feedback(codecs.quantize(bits=bits, rounding="nearest", scale="channel"))
    method = Method(participation=participation.uniform(count=12), solver=solvers.sgd(lr=0.1), sync=sync.every(steps=30))
    method = method.replace(codec=codec, broadcast=Broadcast(codecs.quantize8("block")), precision=policy, batch_size=10)
    task = TaskSpec(data.digits(clients=24, split=data.dirichlet(alpha=0.3)), mlp(hidden=(64, 64)))
    return Experiment(task, method, rounds=ROUNDS, seed=seed, fleet="mixed")


def played(experiment: Experiment, slower: float = 1.0) -> dict[str, Any]:
    """Run: simulated seconds to the target and of all rounds, accuracies, share of cohorts that trained on few bits.

    slower: the seconds "by_library", if all of its steps took so many times as long as the clock has it.
    """
    began = time.process_time()
    lines = taciturn.run(experiment).history
    spent = time.process_time() - began
    trained = [fmean(level > 0 for level in line.get("knobs", {}).get("train", [0])) for line in lines]
    deployed = [(line.get("deployed") or line["metrics"])["accuracy"] for line in lines]
    smooth = [fmean(deployed[end - LAST : end]) for end in range(LAST, ROUNDS + 1)]
    reached = next((place + LAST for place, accuracy in enumerate(smooth) if accuracy >= TARGET), None)
    return {
        "to_target": seconds(lines[:reached]) if reached else None,
        "by_library": seconds(lines[:reached], slower) if reached else None,
        "seconds": seconds(lines),
        "deployed": smooth[-1],
        "float": fmean(line["metrics"]["accuracy"] for line in lines[-LAST:]),
        "qat_share": fmean(trained),
        "megabytes": (lines[-1]["bytes_up"] + lines[-1]["bytes_down"]) / 1e6,
        "cpu_seconds": spent,
    }


def seconds(lines: list[dict[str, Any]], slower: float = 1.0) -> float:
    """Simulated seconds of rounds of one exchange, if steps took so many times as long."""
    parts = (line["simulated"] for line in lines)
    return sum(max(d + slower * c + u for d, c, u in zip(p["down"], p["compute"], p["up"], strict=True)) for p in parts)


def policies(bits: int) -> dict[str, Any]:
    """Who trains how, by name."""
    ptq, qat = f"ptq{bits}", f"qat{bits}"
    return {
        "float32": precision.all(),
        "ptq": precision.all(ptq),
        "qat": precision.all(qat),
        "qat_inputs": precision.all(qat, inputs=8),
        "coarse": precision.coarse(modes=(ptq, qat)),
        "hybrid": precision.coarse_fine(modes=(ptq, qat)),
    }


def one_seed(bits: int, seed: int, slower: float) -> dict[str, dict[str, Any]]:
    """Every policy, and a random hybrid with the hybrid's share. Seeds have fleets and data of their own."""
    torch.set_num_threads(1)
    found = {}
    for name, policy in policies(bits).items():
        found[name] = played(federation(bits, policy, seed), slower if name == "qat" else 1.0)
    share = found["hybrid"]["qat_share"]
    dealt = precision.random(modes=(f"ptq{bits}", f"qat{bits}"), share=(1 - share, share))
    found["random"] = played(federation(bits, dealt if 0 < share < 1 else policies(bits)["hybrid"], seed))
    return found


def federations(seeds: int, slower: float) -> dict[int, dict[str, dict[str, Any]]]:
    """By bits and policy: mean and spread over seeds, on all cores."""
    jobs = [(bits, seed) for seed in range(seeds) for bits in (3, 2)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(one_seed, *zip(*((*job, slower) for job in jobs), strict=True)))
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for bits in (3, 2):
        mine = [run for (asked, _), run in zip(jobs, runs, strict=True) if asked == bits]
        found[bits] = {
            name: {key: mean_spread([run[name][key] for run in mine]) for key in mine[0][name]} for name in mine[0]
        }
    return found


def compared(rows: dict[str, dict[str, Any]], suffix: str = "") -> dict[str, Any]:
    """Times to the target of the hybrid over those of others; points of deployed accuracy above theirs; the ceiling is what
    never training on few bits would save of all QAT's time.
    """

    def mean(name: str, key: str) -> Any:
        return rows[name][key]["mean"]

    figures: dict[str, Any] = {f"qat_share{suffix}": mean("hybrid", "qat_share")}
    one = mean("hybrid", "to_target")
    for other in ("qat", "ptq", "coarse", "random"):
        two = mean(other, "to_target")
        figures[f"hybrid_vs_{other}_time{suffix}"] = one / two if one and two else None
        figures[f"hybrid_vs_{other}_round_time{suffix}"] = mean("hybrid", "seconds") / mean(other, "seconds")
        points = 100 * (mean("hybrid", "deployed") - mean(other, "deployed"))
        figures[f"deployed_minus_{other}_points{suffix}"] = points
    slow = mean("qat", "by_library")
    figures[f"library_qat_vs_hybrid_time{suffix}"] = slow / one if slow and one else None
    figures[f"ceiling{suffix}"] = mean("qat", "seconds") / mean("ptq", "seconds")
    figures[f"of_ceiling{suffix}"] = mean("ptq", "seconds") / mean("hybrid", "seconds")
    return figures


def shown(bits: int, rows: dict[str, dict[str, Any]]) -> Table:
    """The policies as a table."""
    table = Table("policy", *next(iter(rows.values())), title=f"federations, {bits} bits, simulated seconds")
    for name, row in rows.items():
        cells = ((row[key]["mean"], row[key]["spread"]) for key in row)
        table.add_row(name, *("-" if mean is None else f"{mean:.3f} \u00b1 {spread:.3f}" for mean, spread in cells))
    return table


def main() -> None:
    """Run, print."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    keep_freed_memory()  # as engines do
    solved, rows = allocator(), overheads(quick)
    table = Table("a training step", *next(iter(rows.values())), title=f"quantization-aware training, {BITS} bits")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    ticks = clock()
    slower = rows["federation"]["library / float"] / ticks["train"]
    print(f"a QAT step over a float one, on the clock: lean {ticks['train']:.2f}, library {slower * ticks['train']:.2f}")
    seeds = 2 if quick else 5
    runs = federations(seeds, slower)
    Console(width=120).print(table, *(shown(bits, found) for bits, found in runs.items()))
    figures: dict[str, Any] = {
        "allocator": solved,
        "qat_overhead": {name: row["lean / float"] for name, row in rows.items()},
        "qat_inputs_overhead": {name: row["inputs / float"] for name, row in rows.items()},
        "library_qat_overhead": {name: row["library / float"] for name, row in rows.items()},
        "cost_model_overhead": {name: row["model of cost"] for name, row in rows.items()},
        "clock_overhead": ticks,
        **compared(runs[3]),
        **compared(runs[2], "_2_bits"),
        "n": {"tasks": 1, "seeds": seeds, "rounds": ROUNDS},
        "federations": {f"{bits} bits": found for bits, found in runs.items()},
    }
    finish("fedhq", figures, quick)


if __name__ == "__main__":
    main()
