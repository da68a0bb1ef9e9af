"""Where duals pay: FedAPM, FedAlt and FedSim on digits under more or fewer clients, local steps and bits.

20 clients with Dirichlet(0.3) labels, a personal head; 40 rounds. One thing is changed at a time from 4 clients a round, 10
local steps, float32. Each method's client step size is tuned in each place (three values, validation data, a seed of its
own); then the other seeds, on the clients' test data, after the last round.
"""

from __future__ import annotations

import os
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import finish, parser
from bench.fedapm import CASES, HEAD, TUNING_SEED, each, experiment, optimizer
from taciturn import Method, codecs, methods

CASE = CASES["digits"]
PLACES: dict[str, dict[str, Any]] = {
    "4 of 20 clients, 10 steps": {},
    "1 client": {"count": 1},
    "2 clients": {"count": 2},
    "10 clients": {"count": 10},
    "20 clients": {"count": 20},
    "4 steps": {"steps": 4},
    "40 steps": {"steps": 40},
    "4 bits up": {"codec": codecs.quantize4()},
    "2 bits up": {"codec": codecs.quantize2()},
}
QUICK = ("4 of 20 clients, 10 steps", "20 clients")


def _method(name: str, lr: float, steps: int, codec: Any) -> Method:
    u, half = optimizer(CASE, lr), {"v_steps": steps // 2, "u_steps": steps - steps // 2}
    if name == "fedapm":
        return methods.fedapm(HEAD, u=u, sigma=0.05, codec=codec or codecs.identity(), **half)
    parts = {"codec": codec} if codec else {}
    return (
        methods.fedalt(HEAD, u=u, **half, **parts) if name == "fedalt" else methods.fedsim(HEAD, u=u, steps=steps, **parts)
    )


def run_place(place: str, name: str, lr: float, seed: int, tuning: bool) -> dict[str, Any]:
    """One run -> the mean over clients at the end."""
    change = PLACES[place]
    case = replace(CASE, count=change.get("count", CASE.count))
    method = _method(name, lr, change.get("steps", 10), change.get("codec"))
    told = {"place": place, "method": name, "lr": lr, "seed": seed}
    try:
        result = taciturn.run(experiment(case, method, seed, tuning))
    except taciturn.TaciturnError as error:
        return told | {"failed": str(error), "value": 0.0}
    return told | {"value": fmean(result.history[-1]["spread"]["accuracy"]), "bytes": result.bytes_up + result.bytes_down}


def main() -> None:
    """Tune in each place, run, print."""
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = options.parse_args()
    places = list(QUICK if chosen.quick else PLACES)
    names, seeds = ("fedapm", "fedalt", "fedsim"), range(1 if chosen.quick else 5)
    cells = [(place, name) for place in places for name in names]
    tried = each(run_place, [(*cell, lr, TUNING_SEED, True) for cell in cells for lr in CASE.lr], chosen.processes)
    best = {
        cell: max((one for one in tried if (one["place"], one["method"]) == cell), key=lambda one: one["value"])["lr"]
        for cell in cells
    }
    runs = each(run_place, [(*cell, best[cell], seed, False) for cell in cells for seed in seeds], chosen.processes)
    table, found = Table("digits, personal head", *names), {}
    for place in places:
        row = {}
        for name in names:
            values = [one["value"] for one in runs if (one["place"], one["method"]) == (place, name)]
            spread = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            row[name] = {"mean": fmean(values), "standard_error": spread, "lr": best[place, name]}
        found[place] = row
        cells_of = (f"{c['mean']:.4f}" + ("" if c["standard_error"] is None else f" ± {c['standard_error']:.4f}")
                    for c in row.values())  # fmt: skip
        table.add_row(place, *cells_of)
    Console(width=100).print(table)
    n = {"tasks": 1, "seeds": len(seeds), "rounds": CASE.rounds}
    finish("fedapm_where", {"places": found, "n": n}, chosen.quick)


if __name__ == "__main__":
    main()
