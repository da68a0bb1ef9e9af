"""The roofline of a local step against the step: seconds that `fleet` predicts on this machine, and seconds that it takes.

The machine is measured first (`taciturn profile`); then one local step of each task is run alone and in turn, one thread,
in CPU seconds. ratio: the least of the steps / predicted. A ratio that is the same for all tasks would cancel in every
comparison; where it falls with the size of a step, starting an operator costs more than `launch`.
"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import arguments, finish
from taciturn.client import Work
from taciturn.experiment.experiment import DTYPES
from taciturn.experiment.simulated import one_step
from taciturn.fleet import Profile, count, measure
from taciturn.tasks.models import mlp

TASKS = ("quickstart", "mnist", "mnist, batches of 500", "mnist, 2 x 1000 wide, batches of 500", "bbc-lora")


def work_of(name: str) -> tuple[Work, int]:
    """The recipe of that name, with the changes that the name says; and its batch size."""
    experiment = taciturn.recipe(name.partition(",")[0])
    method, task = experiment.method, experiment.task
    if "batches" in name:
        method = method.replace(batch_size=500)
    if "wide" in name:
        task = taciturn.TaskSpec(task.data, mlp(hidden=(1000, 1000)))
    built = task.build(0, "cpu", DTYPES[experiment.dtype], method.partition.prepare)
    return Work(built, method.split(built.model, built.tracked), method.solver, method.codec), method.batch_size


def main() -> None:
    """The table, and bench/results/fleet.json."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    repeats, device = (5, measure(patience=0.1)) if quick else (30, measure())
    profile, rows = device.profile(Profile("here")), {}
    for name in TASKS[: 2 if quick else None]:
        step = one_step(*work_of(name))
        operators, took = count(step), []
        step()
        for _ in range(repeats):
            start = time.process_time()
            step()
            took.append(time.process_time() - start)
        predicted = profile.step_seconds(operators)
        rows[name] = {
            "gflop": sum(one.flops * one.times for one in operators) / 1e9,
            "operators": sum(one.times for one in operators),
            "predicted_ms": 1e3 * predicted,
            "observed_ms": 1e3 * min(took),
            "ratio": min(took) / predicted,
        }
    table = Table("task", *next(iter(rows.values())), title=f"{profile}")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    Console(width=150).print(table)
    finish("fleet", {"profile": str(profile), "tasks": rows, "repeats": repeats}, quick)


if __name__ == "__main__":
    main()
