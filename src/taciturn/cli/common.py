"""What all commands share: where they write, arguments, an experiment from its source, progress, a summary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from taciturn.advisor import STUDIES
from taciturn.core.errors import unknown
from taciturn.experiment import config
from taciturn.experiment.experiment import Experiment
from taciturn.experiment.recipes import RECIPES, recipe
from taciturn.report import human_bytes

out, err = Console(), Console(stderr=True)
Source = Annotated[str, typer.Argument(help="a recipe (taciturn ls) or a TOML file")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="path=value, for example method.solver.lr=0.05")]
Data = Annotated[str, typer.Option("--data", help="folder or file of the recipe's data")]


def experiment_of(source: str, settings: list[str] | None, data: str, **changes: Any) -> Experiment:
    """The experiment of a recipe or a TOML file, with values changed. Errors: `ConfigError`, `UnknownName`."""
    if source.endswith(".toml") or Path(source).is_file():
        table = config.read_experiment(Path(source))
        if data:
            config.set_path(table, "data.path", data)
    elif source in RECIPES:
        table = config.to_table(recipe(source, data))
    else:
        raise unknown("recipe", source, [*RECIPES, *STUDIES])
    for text in settings or []:
        config.set_path(table, *config.parse_setting(text))
    table |= {name: value for name, value in changes.items() if value is not None}
    experiment = config.from_table(table)
    return experiment


class Progressing:
    """A progress bar on a terminal, plain lines elsewhere, nothing with --json."""

    def __init__(self, experiment: Experiment, silent: bool) -> None:
        self._rounds, self._silent = experiment.rounds, silent
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=err) if err.is_terminal and not silent else None
        self._name = experiment.name

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(escape(self._name), total=self._rounds, note="")
        return self._line

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, line: dict[str, Any]) -> None:
        if self._silent:
            return
        metrics = " ".join(f"{name} {value:.4g}" for name, value in (line["metrics"] or {}).items() if name != "loss")
        note = (
            f"loss {line['loss']:.4f} {metrics} up {human_bytes(line['bytes_up'])} down {human_bytes(line['bytes_down'])}"
        )
        if line["left_out"]:
            note += f" left out {len(line['left_out'])}"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["round"], note=f"{line['round']}/{self._rounds} {note}")
        else:
            print(f"round {line['round']}/{self._rounds} {note} {line['seconds']:.1f} s", file=sys.stderr, flush=True)


def print_summary(summary: dict[str, Any]) -> None:
    """A summary as two columns."""
    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        shown = (
            human_bytes(value) if name.startswith("bytes") else f"{value:.4f}" if isinstance(value, float) else str(value)
        )
        table.add_row(name, escape(shown))
    out.print(table)
