"""The AMS sketch: what one costs, and how far its estimate of the squared norm is off.

Time: one vector of d = 10^7 float32, 3 rows of 500, one thread, milliseconds of CPU time (best and median): the table of
places once, then a sketch with it, in C and in torch; beside them a copy of the vector into memory that is there. Memory:
bytes a parameter, of the table and in all (how far the peak of the resident set rose while table and sketch were made for
the first time). Error: M2 / ||v||^2 - 1 over seeds, for vectors of 10^6 values: Gaussian, uniform in 0..1, Student t with
two degrees of freedom (heavy tails), one value in 1000 not zero; one row's standard deviation should be near sqrt(2 / 500)
= 0.063. "over": share of seeds where M2 > (1 + eps) ||v||^2 with eps = 1 / sqrt(500): there M2 / (1 + eps), which is taken
from the mean square of the drifts, is more than the squared norm of their mean, and the estimated variance too low.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import arguments, finish
from taciturn.core import kernel, random
from taciturn.sync import sketch as ams

D, FEW, ROWS, COLUMNS = 10_000_000, 1_000_000, 3, 500


def timed(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time."""
    took = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        took.append((time.process_time() - start) * 1e3)
    return {"best": min(took), "median": median(took)}


def grown(run: Callable[[], Any]) -> float:
    """Bytes by which the peak of the resident set rises."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0


def drawn(kind: str, d: int) -> torch.Tensor:
    """[d] float32."""
    key = random.key(1)
    normal, uniform = random.normal(key, d), random.uniform(random.fold(key, "uniform"), d)
    if kind == "t2":
        return normal / (-torch.log1p(-uniform)).sqrt()
    return {"Gauss": normal, "uniform": uniform, "sparse": torch.where(uniform < 1e-3, normal, 0.0)}[kind]


def errors(v: torch.Tensor, seeds: int) -> dict[str, float]:
    """Of M2 / ||v||^2 - 1, and of one row's energy."""
    true = float(v.double().square().sum())
    sk = torch.stack([ams.sketch(v, ams.table(seed, len(v), ROWS, COLUMNS), COLUMNS) for seed in range(seeds)])
    m2, rows = ams.energy(sk) / true - 1, sk.double().square().sum(-1) / true - 1
    return {
        "bias": float(m2.mean()), "sd": float(m2.std()), "largest": float(m2.abs().max()), "row sd": float(rows.std()),
        "over": float((m2 > COLUMNS**-0.5).double().mean()),
    }  # fmt: skip


def show(title: str, rows: dict[str, dict[str, float]], digits: int) -> None:
    """Rows of equal columns."""
    table = Table("", *next(iter(rows.values())), title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.{digits}f}" for value in row.values()))
    Console(width=120).print(table)


def main() -> None:
    """Run, print."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    seeds, repeats = (10, 5) if quick else (40, 15)
    u = torch.empty(D).normal_(generator=torch.Generator().manual_seed(0))
    ams.sketch(u[:100], ams.table(0, 100, ROWS, COLUMNS), COLUMNS)  # what is loaded once
    rise = grown(lambda: ams.sketch(u, ams.table(0, D, ROWS, COLUMNS), COLUMNS))
    table, f, spare = ams.table(0, D, ROWS, COLUMNS), ams.coefficients(0, ROWS), torch.zeros(D)
    times = {
        "sketch": timed(lambda: ams.sketch(u, table, COLUMNS), repeats),
        "table": timed(lambda: kernel.ams_table(f, 0, D, COLUMNS), repeats),
        "copy": timed(lambda: spare.copy_(u), repeats),
    }
    with kernel.without_library():
        times["sketch, torch"] = timed(lambda: ams.sketch(u, table, COLUMNS), 3)
    memory = {"table": {"bytes": table.nbytes / D}, "table and a sketch, resident": {"bytes": rise / D}}
    show(f"ms, {D:,} values, {ROWS} x {COLUMNS}", times, 1)
    show("bytes a parameter", memory, 2)
    wrong = {kind: errors(drawn(kind, FEW), seeds) for kind in ("Gauss", "uniform", "t2", "sparse")}
    show(f"M2 / ||v||^2 - 1, {FEW:,} values, {seeds} seeds", wrong, 4)
    figures = {
        "d": D, "ms_per_sketch": times["sketch"]["best"], "bytes_per_parameter": max(rise, table.nbytes) / D,
        "rel_error_sd": wrong["Gauss"]["sd"], "ms_torch_twin": times["sketch, torch"]["best"],
        "ms_copy": times["copy"]["best"], "ms_table": times["table"]["best"], "seeds": seeds, "repeats": repeats,
        "times": times, "errors": wrong,
    }  # fmt: skip
    finish("sketch", figures, quick)


if __name__ == "__main__":
    main()
