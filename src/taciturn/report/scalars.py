"""The numbers of runs as TensorBoard's event files: a folder a run, scalars by round.

    METRIC, loss_evaluated       of every evaluated round, all that were measured
    loss                         of training
    bytes/up, /down, /both       cumulative, on the line, without evaluation
    steps, drift                 local steps of the mean client; mean |u|^2 of a cohort, where a dynamic rule saw it
    simulated_seconds            cumulative
    over_bytes/METRIC            the leading metric; the axis is bytes up + down, cumulative, in place of rounds

TensorBoard's "relative" axis is the run's own wall-clock time. Event files hold float32, so bytes to seven digits (exactly
on the axis). Needs `pip install 'taciturn[tensorboard]'`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from taciturn.core.errors import ConfigError, RunError
from taciturn.report.read import Run, number, read_run, simulated
from taciturn.report.tables import methods

SUFFIX = ".taciturn"  # of files that a later call replaces


def write_scalars(folders: Sequence[Path], place: Path) -> list[Path]:
    """Write the scalars of the runs in `folders` under `place`: METHOD/seed-K, one event file in each; returns the folders.

    What an earlier call wrote there is replaced. Errors: `ConfigError` without tensorboardX; `RunError` for a folder that
    cannot be read as a run, for runs of different metrics, and where nothing can be written.
    """
    writer = _tensorboardx().SummaryWriter
    written: dict[Path, Run] = {}
    for group in methods([read_run(folder) for folder in folders]):
        name = re.sub(r"[^\w.=,+()#-]+", "-", group.label).lstrip(".") or "run"
        while any(path.parent.name == name for path in written):
            name += "+"
        written |= {Path(place) / name / f"seed-{run.seed}": run for run in group.runs}
    for path, run in written.items():
        try:
            for old in path.glob(f"events.out.tfevents.*{SUFFIX}"):
                old.unlink()
            with writer(str(path), filename_suffix=SUFFIX) as events:
                for tag, step, value, at in scalars(run):
                    events.add_scalar(tag, value, step, walltime=at)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return list(written)


def scalars(run: Run) -> Iterator[tuple[str, int, float, float]]:
    """(tag, step, value, Unix time) round after round; values that are not finite are left out."""
    began = _began(run)
    for line in run.rounds:
        done, up, down, metrics = line["round"], line["bytes_up"], line["bytes_down"], line.get("metrics") or {}
        drift = [value for value in map(number, (line.get("sync") or {}).get("drift") or []) if value is not None]
        told: list[tuple[str, int, Any]] = [
            *((f"{name}_evaluated" if name == "loss" else name, done, value) for name, value in metrics.items()),
            ("loss", done, line.get("loss")),
            *(("bytes/up", done, up), ("bytes/down", done, down), ("bytes/both", done, up + down)),
            ("steps", done, line.get("steps")),
            ("drift", done, sum(drift) / len(drift) if drift else None),
            ("simulated_seconds", done, simulated(line)),
            (f"over_bytes/{run.metric}", up + down, metrics.get(run.metric)),
        ]
        for tag, step, value in told:
            found = number(value)
            if found is not None:
                yield re.sub(r"[^\w./-]", "_", tag), int(step), found, began + (number(line.get("seconds")) or 0.0)


def _began(run: Run) -> float:
    """Unix time of the run's start; 0 where the record does not say it."""
    try:
        return datetime.fromisoformat(str(run.header.get("created"))).timestamp()
    except ValueError:
        return 0.0


def _tensorboardx() -> Any:
    """The package. Errors: `ConfigError` where it is not installed."""
    try:
        import tensorboardX
    except ImportError as error:
        raise ConfigError(f"event files need tensorboardX ({error}): pip install 'taciturn[tensorboard]'") from error
    return tensorboardX
