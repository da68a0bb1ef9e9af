"""The study behind `taciturn run least-squares`: published settings of compressed averaged SGD, simulated and predicted.

Symbols: as in `simulate` and `theory`; K steps; a series is one codec in one setting: excess of w^_K (mean and standard
error over replicas) at log-spaced K, the prediction at the same K and at the published K, and mean bytes of a message.
Codecs are matched in omega: s = 1 quantization has omega = sqrt(d); p = 1 / (omega + 1); h = floor(d p).
Source: Philippenko & Dieuleveut, JMLR 25(288), 2024; the published end values were read off the figures of their
repository, to about 0.03 in log10.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taciturn import codecs
from taciturn.advisor import problems, theory
from taciturn.advisor.draws import Draw, in_law, message_bytes
from taciturn.advisor.moments import IDENTITY, linear, quantized, quantized_bound, trace
from taciturn.advisor.problems import LeastSquares
from taciturn.advisor.recursion import PACKED, blocks, excess
from taciturn.advisor.sheet import page, picture
from taciturn.advisor.simulate import Cell, simulate
from taciturn.core import random
from taciturn.core.errors import require, unknown
from taciturn.core.state import write_atomic

CODECS = ("none", "quantization", "sparsification", "sketch", "rand-h", "PP")
Line = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set: steps of the longest simulated run, replicas (0: as the setting asks), features, seed, points a
    decade, and how many of the settings, in their order.
    """

    steps: int = 10_000
    replicas: int = 0
    d: int = 100
    seed: int = 0
    points: int = 10
    panels: int = 10

    def __post_init__(self) -> None:
        require(self.steps >= 100, f"steps: at least 100; got {self.steps}")
        require(self.d >= 4, f"d: at least 4 features; got {self.d}")
        require(self.replicas >= 0, f"replicas: at least 1, or 0; got {self.replicas}")
        require(self.points >= 1, f"points: at least 1 a decade; got {self.points}")
        require(self.panels >= 1, f"panels: at least 1 setting; got {self.panels}")


@dataclass(frozen=True, slots=True)
class Setting:
    """One panel of the published figures.

    rule: "constant" 1 / (2 (omega + 1) R^2), "horizon" K^-2/5 with a run for each K, or "shared" 1 / (2 R^2).
    memory: with rate 1 / (2 (omega + 1)). published: log10 excess of each codec at `published_steps`.
    """

    key: str
    title: str
    power: float = 4.0
    basis: problems.Basis = "haar"
    clients: int = 1
    shift: str = "none"
    batch: int = 1
    rule: str = "constant"
    memory: bool = False
    published_steps: int = 10**7
    published: tuple[float | None, ...] = ()

    def problem(self, d: int) -> LeastSquares:
        """sigma^2 = N, so that the averaged noise has variance 1."""
        sigma = math.sqrt(self.clients)
        if self.shift == "covariate":
            return problems.covariate_shift(d, self.clients, sigma, self.batch)
        moment = problems.rotated(problems.spectrum(d, self.power), self.basis)
        if self.shift == "optimum":
            return problems.optimum_shift(moment, self.clients, sigma, self.batch)
        return problems.central(moment, sigma, self.batch, self.clients)

    def gamma(self, problem: LeastSquares, omega: float, steps: int) -> float:
        """The step size."""
        if self.rule == "horizon":
            return theory.horizon_step(steps)
        return theory.constant_step(0.0 if self.rule == "shared" else omega, problem)


_POINT: dict[str, Any] = {"power": 1.0, "clients": 10, "shift": "optimum", "rule": "shared", "published_steps": 10**7 // 32}
SETTINGS = (
    Setting("one-mild", "One client, spectrum 1/i, rotated", 1.0, published=(-5.25, -3.96, -3.70, -3.73, -3.73, -4.22)),
    Setting("one-diagonal", "One client, spectrum 1/i⁴, diagonal", basis="identity",
            published=(-5.33, -3.83, -4.53, -1.9, -4.42, -4.55)),
    Setting("one-rotated", "One client, spectrum 1/i⁴, rotated", published=(-5.37, -2.2, -1.95, -1.92, -1.95, -4.48)),
    Setting("one-horizon", "The same, step K^-2/5", rule="horizon", published=(-3.96, -3.7, -3.52, -3.6, -3.43, -3.96)),
    Setting("ten-alike", "Ten clients alike, spectrum 1/i⁴, rotated", clients=10, published_steps=10**6,
            published=(-4.65, -2.45, -2.3, -2.33, -2.28, -3.78)),
    Setting("ten-covariate", "Ten clients, covariate shift", clients=10, shift="covariate", published_steps=10**6,
            published=(-4.3, -1.87, -1.77, -1.70, -1.67, -3.18)),
    Setting("ten-optimum", "Ten clients, optimum shift, spectrum 1/i, batch 32", batch=32, **_POINT,
            published=(-3.2, -1.6, -1.5, -1.5, -1.5, -2.33)),
    Setting("ten-optimum-memory", "The same with memory", batch=32, memory=True, **_POINT,
            published=(-3.2, -2.05, -1.95, -1.95, -1.9, None)),
    Setting("ten-full", "Ten clients, optimum shift, full gradients", batch=0, **_POINT,
            published=(-4.55, -1.8, -1.7, -1.7, -1.7, -3.1)),
    Setting("ten-full-memory", "The same with memory", batch=0, memory=True, **_POINT,
            published=(-4.55, -4.55, -4.55, -4.55, -4.55, -4.55)),
)  # fmt: skip


def matched(d: int) -> dict[str, tuple[in_law, float]]:
    """The codecs at the omega of 1-quantization, and the omega that sets their step.

    For quantization that is the published sqrt(d); its supremum is sqrt(d) - 1.
    """
    p = 1 / (math.sqrt(d) + 1)
    h = max(1, int(d * p))
    chosen = {
        "none": in_law(codecs.identity()),
        "quantization": in_law(codecs.qsgd(levels=1)),
        "sparsification": in_law(codecs.sparsify(p=p)),
        "sketch": in_law(codecs.sketch(h=h)),
        "rand-h": in_law(codecs.rand_k(k=h)),
        "PP": in_law(codecs.partial(p=p)),
    }
    return {name: (draw, math.sqrt(d) if name == "quantization" else draw.omega(d)) for name, draw in chosen.items()}


def settings_from(values: Mapping[str, Any]) -> Settings:
    """{name: value} -> Settings. Errors: `UnknownName` with the nearest names; `ConfigError` for other values."""
    known = {field.name for field in dataclasses.fields(Settings)}
    for name, value in values.items():
        if name not in known:
            raise unknown("setting", name, known, "least-squares")
        require(type(value) is int, f"least-squares: {name}: a whole number; got {value!r}")
    return Settings(**values)


def log_points(last: int, decade: int) -> list[int]:
    """Ascending whole numbers from 10 to `last`, about `decade` to a factor of ten, the last one always among them.

    >>> log_points(1000, 1)
    [10, 100, 1000]
    """
    count = max(1, round(decade * math.log10(last / 10)))
    return sorted({round(10 * (last / 10) ** (i / count)) for i in range(count + 1)} | {last})


# ------------------------------------------------------------------------------------------------------------ a series


def predicted(
    setting: Setting, problem: LeastSquares, codec: Draw, omega: float, gamma: float, steps: list[int]
) -> tuple[str, list[float]]:
    """(what it is, E excess at every K): exact, bound, stand-in (one H for all), asymptote, uncompressed (memory)."""
    coefficients = codec.linear_map(problem.d)

    def c2(moment: torch.Tensor) -> torch.Tensor:
        return quantized_bound(moment) if coefficients is None else linear(coefficients, moment)

    if setting.memory:
        if problem.batch == 0:
            return "uncompressed", excess(problem, IDENTITY, gamma, steps)
        if coefficients is None:
            noise = theory.memory_limit(problem, c2)
        else:
            noise = theory.memory_noise(problem, coefficients, 1 / (2 * (omega + 1)))
        return "asymptote", [theory.asymptotic(noise, problem.curvature, k) for k in steps]
    kind = "bound" if coefficients is None else "exact"
    if not problem.alike:
        kind = "stand-in"
        problem = problems.central(problem.curvature, problem.sigma, problem.batch, problem.clients)
    straight = bool((problem.eigen[1] == torch.eye(problem.d)).all())
    if coefficients is not None and (straight or coefficients[1] == 0 or problem.d <= PACKED):
        return kind, excess(problem, coefficients, gamma, steps)
    return kind, blocks(problem, c2, gamma, steps)


def cost(problem: LeastSquares, codec: Draw) -> float:
    """Tr(C_ania H^-1) without memory; for quantization exact where all optima agree, else its bound."""
    coefficients = codec.linear_map(problem.d)
    if coefficients is not None:
        noise = theory.induced_noise(problem, lambda moment: linear(coefficients, moment))
    else:
        noise = theory.induced_noise(problem, quantized_bound if bool(problem.offsets.any()) else quantized)
    return trace(noise, problem.curvature)


def series(setting: Setting, name: str, codec: in_law, omega: float, settings: Settings) -> dict[str, Any]:
    """Simulate and predict one codec in one setting."""
    problem, d = setting.problem(settings.d), settings.d
    replicas = settings.replicas or (16 if setting.clients == 1 else 4)
    last, final = settings.steps if setting.clients == 1 else settings.steps // 2, setting.published_steps
    seed = int(random.fold(random.key(settings.seed), setting.key, name))  # no two series share their draws
    if setting.rule == "horizon":
        stops = log_points(last, 1)
        values = torch.cat([_run(setting, problem, codec, omega, [k], replicas, seed) for k in stops])
        far = sorted({*stops, *log_points(final, 1)})
        pairs = [predicted(setting, problem, codec, omega, setting.gamma(problem, omega, k), [k]) for k in far]
        kind, line = pairs[0][0], [value for _, found in pairs for value in found]
    else:
        stops = log_points(last, settings.points)
        values = _run(setting, problem, codec, omega, stops, replicas, seed)
        far = sorted({*stops, *log_points(final, settings.points)})
        kind, line = predicted(setting, problem, codec, omega, setting.gamma(problem, omega, last), far)
    return {
        "setting": setting.key,
        "codec": name,
        "steps": stops,
        "excess": values.mean(1).tolist(),
        "error": (values.std(1) / math.sqrt(replicas)).tolist(),
        "replicas": replicas,
        "start": float(problem.excess(torch.zeros(1, d, dtype=torch.float64))[0]),
        "prediction_steps": far if line else [],
        "prediction": line,
        "prediction_kind": kind,
        "published": {"steps": final, "log10": dict(zip(CODECS, setting.published, strict=False)).get(name)},
        "omega": omega,
        "bytes": message_bytes(codec.codec, d),
        "trace": None if setting.memory else cost(problem, codec),
    }


def predicted_at(one: Mapping[str, Any], steps: int) -> float | None:
    """The prediction of a series at one K, if it has one."""
    known = dict(zip(one["prediction_steps"], one["prediction"], strict=True))
    return known.get(steps)


def _run(
    setting: Setting, problem: LeastSquares, codec: Draw, omega: float, stops: list[int], replicas: int, seed: int
) -> torch.Tensor:
    """-> excess [len(stops), replicas]."""
    alpha = 1 / (2 * (omega + 1)) if setting.memory else 0.0
    cell = Cell(problem, setting.gamma(problem, omega, stops[-1]), alpha)
    return simulate([cell], codec, stops, replicas, seed).excess[0]


# ------------------------------------------------------------------------------------------------------------ the study


def least_squares(folder: Path, values: Mapping[str, Any], say: Line = lambda line: None) -> dict[str, Any]:
    """Averaged compressed SGD on least squares: published settings, simulated and predicted; a few minutes at 10,000 steps.

    Writes study.json, study.html and study.svg into the folder; -> the summary. `say` gets a line for each series.
    """
    settings = settings_from(values)
    began, found = time.perf_counter(), []
    chosen = matched(settings.d)
    for setting in SETTINGS[: settings.panels]:
        for name, (codec, omega) in chosen.items():
            one = series(setting, name, codec, omega, settings)
            found.append(one)
            last = f"10^{math.log10(max(one['excess'][-1], 1e-300)):.2f}"
            say(f"{setting.key:20} {name:15} K = {one['steps'][-1]:>8} excess {last}")
    result = {
        "study": "least-squares",
        "settings": dataclasses.asdict(settings),
        "titles": {setting.key: setting.title for setting in SETTINGS[: settings.panels]},
        "series": found,
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "study.json", [(json.dumps(result) + "\n").encode()])
    write_atomic(folder / "study.html", [page(result).encode()])
    write_atomic(folder / "study.svg", [picture(result).encode()])
    return {"study": "least-squares", "folder": str(folder), **agreement(found), "seconds": result["seconds"]}


def agreement(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How far simulation and exact prediction are apart at the last K, and prediction and print at the published K."""
    exact = [one for one in found if one["prediction_kind"] == "exact"]
    scores, apart = [], []
    for one in exact:
        value, far = predicted_at(one, one["steps"][-1]), predicted_at(one, one["published"]["steps"])
        # where the excess diverges (above where it starts), tails are too heavy for a standard error
        steady = value is not None and value <= one["start"] and one["replicas"] > 4
        if value is not None and steady and one["error"][-1] > 1e-6 * value:
            scores.append(abs(one["excess"][-1] - value) / one["error"][-1])
        if far and one["published"]["log10"] is not None:
            apart.append(abs(math.log10(far) - one["published"]["log10"]))
    return {
        "series": len(found),
        "exact_series": len(scores),
        "median_z": _middle(scores),
        "largest_z": round(max(scores, default=0.0), 2),
        "median_log10_from_published": _middle(apart),
        "largest_log10_from_published": round(max(apart, default=0.0), 2),
    }


def _middle(values: list[float]) -> float | None:
    return round(sorted(values)[len(values) // 2], 2) if values else None
