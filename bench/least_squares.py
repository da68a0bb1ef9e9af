"""Averaged compressed SGD on Gaussian least squares: simulation against the exact recursion, and the order of the codecs.

d = 20, lambda_i = 1/i, codecs matched in omega (s = 1 quantization): diagonal, rotated and standardized features x three
step sizes x K. The steps: 1 and 1/4 of 1 / (2 (omega + 1) R^2) from w_0 = 0 (quantization: 1 and 1/16, where its bound
holds), and one that all share, 1/2 of rand-h's, from w_0 = w*. z = (simulated - exact) / standard error for every linear
codec; quantization against its upper bounds. A few cells go through the library's messages, a few have four clients
(covariate shift, optimum shift). Order: Tr(C_ania H^-1), and the excess at the shared step in standard errors.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import arguments, finish
from taciturn import codecs
from taciturn.advisor import moments, problems, recursion, theory
from taciturn.advisor.draws import Draw, in_law, stabilized, through
from taciturn.advisor.problems import LeastSquares
from taciturn.advisor.simulate import Cell, simulate

D = 20
STOPS = (1000, 10_000, 30_000)
# what the traces say, smallest first
ORDERS = {
    "diagonal": ("none", "PP", "rand-h", "sketch"),
    "rotated": ("none", "PP", "quantization", "sparsification", "rand-h"),
    "standardized": ("none", "PP", "quantization", "sparsification", "rand-h"),
}


def bases() -> dict[str, LeastSquares]:
    """One client, sigma = 1."""
    turned = problems.rotated(problems.spectrum(D, 1), "haar")
    found = {"diagonal": problems.rotated(problems.spectrum(D, 1), "identity"), "rotated": turned}
    return {name: problems.central(h) for name, h in (found | {"standardized": problems.standardized(turned)}).items()}


def draws() -> dict[str, Draw]:
    """The codecs at the omega of quantization."""
    p = 1 / (math.sqrt(D) + 1)
    h = int(D * p)
    return {
        "none": in_law(codecs.identity()),
        "PP": in_law(codecs.partial(p=p)),
        "sparsification": in_law(codecs.sparsify(p=p)),
        "rand-h": in_law(codecs.rand_k(k=h)),
        "sketch": in_law(codecs.sketch(h=h)),
        "stabilized": stabilized(),
        "quantization": in_law(codecs.qsgd(levels=1)),
    }


def step_sizes(name: str, draw: Draw, problem: LeastSquares) -> dict[str, float]:
    """From w_0 = 0."""
    constant = theory.constant_step(draw.omega(D), problem)
    return {"published": constant} | ({"1/16": constant / 16} if name == "quantization" else {"1/4": constant / 4})


def rows_of(
    name: str,
    draw: Draw,
    cells: dict[tuple[str, str], Cell],
    stops: tuple[int, ...],
    replicas: int,
    seed: int,
    start: float = 0.0,
) -> list[dict[str, Any]]:
    """Simulate the cells {(basis, step): cell} from w_0 = (start, .., start); a row for each cell and K."""
    w0 = torch.full((D,), start)
    found, rows = simulate(list(cells.values()), draw, stops, replicas, seed, w0).excess, []
    coefficients = draw.linear_map(D)
    for ((basis, step), cell), excess in zip(cells.items(), found, strict=True):
        exact: list[Any] = [None] * len(stops)
        if coefficients is not None:
            exact = recursion.excess(cell.problem, coefficients, cell.gamma, stops, w0)
        for k, values, value in zip(stops, excess, exact, strict=True):
            row = {"codec": name, "basis": basis, "step": step, "gamma": cell.gamma, "K": k, "replicas": replicas}
            row |= {"excess": float(values.mean()), "error": float(values.std() / math.sqrt(replicas)), "exact": value}
            if value is not None:
                row["z"] = (row["excess"] - value) / row["error"]
            rows.append(row | _bounds(cell, draw, name, k, w0))
    return rows


def _bounds(cell: Cell, draw: Draw, name: str, k: int, w0: torch.Tensor) -> dict[str, float]:
    """T1 for linear C, T2 for quantization, and its Cauchy-Schwarz recursion; one client."""
    problem, coefficients = cell.problem, draw.linear_map(D)
    if problem.clients > 1:
        return {}
    if coefficients is None:
        noise = theory.induced_noise(problem, moments.quantized)
        surrogate = recursion.blocks(problem, moments.quantized_bound, cell.gamma, [k], w0)[0]
        return {"bound": theory.hoelder_bound(problem, noise, cell.gamma, k, w0), "surrogate": surrogate}
    noise = theory.induced_noise(problem, lambda moment: moments.linear(coefficients, moment))
    if name == "stabilized":
        return {"bound": theory.hoelder_bound(problem, noise, cell.gamma, k, w0)}
    return {"bound": theory.lipschitz_bound(problem, noise, draw.omega(D), cell.gamma, k, w0)}


def main() -> None:
    """Simulate, compare, print."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    stops, replicas = (STOPS[:2], 200) if quick else (STOPS, 400)
    began, rows = time.perf_counter(), []
    every, settings = draws(), bases()
    for place, (name, draw) in enumerate(every.items()):
        cells = {
            (basis, step): Cell(problem, gamma)
            for basis, problem in settings.items()
            for step, gamma in step_sizes(name, draw, problem).items()
        }
        rows += rows_of(name, draw, cells, stops, replicas, 2 * place)
        slow = every["rand-h"].omega(D)
        shared = {(b, "shared"): Cell(problem, theory.constant_step(slow, problem) / 2) for b, problem in settings.items()}
        rows += rows_of(name, draw, shared, stops, 2 * replicas, 2 * place + 1, start=1.0)
        print(f"{name} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    rows += _more(every, settings, quick)
    traces = {basis: _traces(problem, every) for basis, problem in settings.items()}
    orders = [_order(basis, traces[basis], rows, stops[-1]) for basis in settings]
    _print(rows, stops, orders)
    figures = _figures(rows, orders) | {
        "traces": traces,
        "orders": orders,
        "seconds": round(time.perf_counter() - began, 1),
    }
    n = {"replicas": replicas, "d": D, "steps": stops[-1], "bases": 3, "step_sizes": 3, "codecs": len(every)}
    finish("least_squares", figures | {"n": n, "rows": [] if quick else [_line(row) for row in rows]}, quick)


def _line(row: dict[str, Any]) -> str:
    """A row in a line of the result file."""
    head = (
        f"{row['codec']}, {row['basis']}, step {row['step']} {row['gamma']:.4g}, K {row['K']}, {row['replicas']} replicas: "
    )
    text = head + f"{row['excess']:.5g} +- {row['error']:.2g}"
    named = {"exact": row["exact"], "z": row.get("z"), "bound": row.get("bound"), "surrogate": row.get("surrogate")}
    return text + "".join(f", {name} {value:.5g}" for name, value in named.items() if value is not None)


def _more(every: dict[str, Draw], settings: dict[str, LeastSquares], quick: bool) -> list[dict[str, Any]]:
    """Through the library's messages (K = 300), and four clients (K = 1000)."""
    rows, replicas = [], 100 if quick else 400
    for place, (name, draw) in enumerate(every.items()):
        if name in ("none", "stabilized", "sketch", "quantization"):
            continue
        problem = settings["rotated"]
        cells = {("rotated", "messages"): Cell(problem, theory.constant_step(draw.omega(D), problem))}
        rows += rows_of(name, through(draw.codec), cells, (300,), replicas, 1000 + place)
    for place, (name, draw) in enumerate(every.items()):
        if name == "quantization":
            continue
        shifts = {
            "covariate": problems.covariate_shift(D, 4, 2.0, powers=(0.5, 1.0), seed=1),
            "optimum": problems.optimum_shift(settings["rotated"].curvature, 4, 1.0, scale=1.0, seed=1),
        }
        cells = {(s, "published"): Cell(p, theory.constant_step(draw.omega(D), p)) for s, p in shifts.items()}
        rows += rows_of(name, draw, cells, (1000,), replicas, 2000 + place)
    return rows


def _traces(problem: LeastSquares, every: dict[str, Draw]) -> dict[str, float]:
    found = {}
    for name, draw in every.items():
        coefficients = draw.linear_map(D)
        h = problem.curvature
        found[name] = moments.trace(moments.quantized(h) if coefficients is None else moments.linear(coefficients, h), h)
    return found


def _order(basis: str, traces: dict[str, float], rows: list[dict[str, Any]], last: int) -> dict[str, Any]:
    """Neighbors of ORDERS: do the traces rise, and by how many standard errors does the simulated excess."""
    common = {r["codec"]: r for r in rows if (r["basis"], r["step"], r["K"]) == (basis, "shared", last)}
    gaps = {}
    for a, b in itertools.pairwise(ORDERS[basis]):
        gap = common[b]["excess"] - common[a]["excess"]
        gaps[f"{a} < {b}"] = round(gap / math.hypot(common[a]["error"], common[b]["error"]), 1)
    rise = all(traces[a] < traces[b] for a, b in itertools.pairwise(ORDERS[basis]))
    equal = basis != "diagonal" or math.isclose(traces["PP"], traces["sparsification"])
    return {"basis": basis, "order": list(ORDERS[basis]), "traces_rise": rise and equal, "gaps_in_standard_errors": gaps}


def _figures(rows: list[dict[str, Any]], orders: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [row["z"] for row in rows if "z" in row]
    bounded = [row for row in rows if row.get("bound", math.inf) < math.inf]
    rounded = [row for row in rows if "surrogate" in row]
    gaps = [gap for order in orders for gap in order["gaps_in_standard_errors"].values()]
    over = [row["excess"] / row["surrogate"] for row in rounded]
    return {
        "cells": len(scores),
        "max_abs_z": round(max(map(abs, scores)), 2),
        "mean_z2": round(sum(z * z for z in scores) / len(scores), 3),
        "beyond_2": sum(abs(z) > 2 for z in scores),
        "bounds": len(bounded),
        "bounds_ok": all(row["excess"] - 4 * row["error"] <= row["bound"] for row in bounded),
        "tightest_bound": round(min(row["bound"] / row["excess"] for row in bounded), 2),
        "surrogate_ok": all(
            row["excess"] - 4 * row["error"] <= row["surrogate"] for row in rounded if row["basis"] == "diagonal"
        ),
        "surrogate_ratio": [round(min(over), 3), round(max(over), 3)],
        "orderings_ok": all(order["traces_rise"] for order in orders) and min(gaps) > -4,
        "orderings_supported": sum(gap > 4 for gap in gaps),
        "orderings": len(gaps),
        "smallest_gap_in_standard_errors": min(gaps),
    }


def _print(rows: list[dict[str, Any]], stops: tuple[int, ...], orders: list[dict[str, Any]]) -> None:
    table = Table("codec", "basis", "step", *(f"K = {k}: excess and z, or bound" for k in stops))
    for (codec, basis, step), group in itertools.groupby(rows, key=lambda row: (row["codec"], row["basis"], row["step"])):
        cells = []
        for row in group:
            note = f"z {row['z']:+.2f}" if "z" in row else f"<= {row['surrogate']:.2e}"
            cells.append(f"{'' if row['K'] in stops else 'K = ' + str(row['K']) + ': '}{row['excess']:.3e} {note}")
        table.add_row(codec, basis, step, *cells)
    console = Console(width=150)
    console.print(table)
    for order in orders:
        console.print(f"{order['basis']}: {' < '.join(order['order'])}; {order['gaps_in_standard_errors']}")


if __name__ == "__main__":
    main()
