"""A run folder, read from its files only; nothing is trained, imported or guessed.

    run.json       what was run: name, seed, configuration, engine, versions, metric and its goal (format 1)
    record.jsonl   one line a round: loss, metrics, cumulative bytes and seconds, traffic by kind, clients left out,
                   and what a dynamic synchronisation rule told ("sync": missing in old records, {} for a fixed rule),
                   and what aggregation told of each layer ("aggregate", likewise), and the round in simulated time
                   ("simulated": missing in old records)
    config.toml    the configuration as text, to run again; shown as it is where it is there
    result.json    the final summary; absent while a run is going on and after it was interrupted

Units: bytes are bytes on the line (payload + frame), seconds are wall-clock seconds unless they are
simulated, rounds count from 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taciturn.core.errors import RunError
from taciturn.experiment.record import read_header, read_lines

GOALS = ("max", "min")
NEEDED = ("round", "bytes_up", "bytes_down")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what was asked (`header`, the content of run.json) and what happened (`rounds`, one dict a round)."""

    path: Path
    name: str
    seed: int
    metric: str
    goal: str
    header: dict[str, Any]
    rounds: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None = None
    config: str | None = None

    @property
    def bytes_up(self) -> int:
        """Bytes sent by clients in the whole run."""
        return int(self.rounds[-1]["bytes_up"])

    @property
    def bytes_down(self) -> int:
        """Bytes sent to clients in the whole run."""
        return int(self.rounds[-1]["bytes_down"])

    @property
    def bytes_evaluate(self) -> int:
        """Bytes spent on evaluation in the whole run."""
        return int(self.rounds[-1].get("bytes_evaluate") or 0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the whole run."""
        return float(self.rounds[-1].get("seconds") or 0.0)

    @property
    def simulated(self) -> float | None:
        """Simulated seconds of the whole run; None in old records."""
        return simulated(self.rounds[-1])

    @property
    def target(self) -> float | None:
        """The value of the metric that the run's own configuration aims at, if any."""
        return number(self.header.get("target"))

    def client(self, index: object) -> str:
        """The name of a client, given its index in run.json's list or its name."""
        names = self.header.get("clients") or []
        if isinstance(index, int) and 0 <= index < len(names):
            return str(names[index])
        return str(index)


def number(value: object) -> float | None:
    """A finite number as a float, or None for anything else (null, NaN, text).

    >>> number(2), number(float("nan")), number(None)
    (2.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def simulated(line: Mapping[str, Any]) -> float | None:
    """Simulated seconds until the end of a round; None in old records."""
    found = line.get("simulated")
    return number(found.get("total")) if isinstance(found, Mapping) else None


def read_run(path: str | Path) -> Run:
    """Read a run folder. A torn last line of the record (a run killed while it wrote) is left out.

    Where a resumed run repeats rounds, the later lines count. Raises `RunError`, which names the path, for a folder
    that is no run folder, that another format wrote, that has no finished round, or with a line that cannot be read.
    """
    folder = Path(path)
    header = _check_header(read_header(folder), folder / "run.json")
    rounds = _check_lines(read_lines(folder), folder / "record.jsonl")
    metric, config = header["metric"], folder / "config.toml"
    return Run(
        path=folder,
        name=str(header["name"]),
        seed=int(header["seed"]),
        metric=str(metric["name"]),
        goal=str(metric["goal"]),
        header=header,
        rounds=tuple(rounds),
        result=_read_json(folder / "result.json") if (folder / "result.json").is_file() else None,
        config=config.read_text(encoding="utf-8", errors="replace").strip() if config.is_file() else None,
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def _check_header(header: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, kind in (("name", str), ("seed", int), ("metric", Mapping)):
        if not isinstance(header.get(key), kind):
            raise RunError(f"{file}: {key!r} is {header.get(key)!r}, expected a {kind.__name__.lower()}")
    if not isinstance(header["metric"].get("name"), str) or header["metric"].get("goal") not in GOALS:
        raise RunError(f"{file}: metric is {header['metric']!r}, expected a name and a goal of {' or '.join(GOALS)}")
    return header


def _check_lines(lines: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    if not lines:
        raise RunError(f"{file.parent}: has no rounds: record.jsonl is missing or holds no finished round")
    for line in lines:
        for key in NEEDED:
            if number(line.get(key)) is None:
                raise RunError(f"{file}: in round {line.get('round')!r}, {key!r} is {line.get(key)!r}, expected a number")
    return lines
