"""What is compared: every combination of the values that vary, as tables of experiments.

Values of `method.*` make methods; all others (data, fleet, model) make scenarios, in each of which the methods are held to
one target. Symbols: a cell is a method in a scenario; its table is that of config.py, without a seed.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taciturn.core.errors import ConfigError, require
from taciturn.experiment import config
from taciturn.experiment.spelled import spelled, split_list


@dataclass(frozen=True)
class Vary:
    """A path and the values that it takes: texts, and what they mean."""

    path: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def short(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[2]

    @property
    def of_method(self) -> bool:
        """True if it makes methods, not scenarios."""
        return self.path.startswith("method.")


@dataclass(frozen=True)
class Cell:
    """A method in a scenario: their names, and the experiment's table. base: its name among the methods given, or ""."""

    method: str
    scenario: str
    table: dict[str, Any]
    base: str = ""

    @property
    def folder(self) -> str:
        """A name of a folder."""
        return _slug(f"{self.method}--{self.scenario}" if self.scenario else self.method)

    @property
    def label(self) -> str:
        """The name of its runs in a report."""
        return f"{self.method}, {self.scenario}" if self.scenario else self.method


def parse_vary(text: str, option: str = "--vary") -> Vary:
    """ "method.codec=identity,quantize(bits=2)" -> its path and values. Errors: `ConfigError`.

    >>> parse_vary("data.alpha=0.1,1.0").values
    (0.1, 1.0)
    """
    path, sign, rest = text.partition("=")
    texts = tuple(split_list(rest))
    require(
        bool(sign and path.strip() and texts),
        f"{option} {text}: write path=value,value, for example {option} method.codec=identity,quantize4",
    )
    require(len(set(texts)) == len(texts), f"{option} {text}: a value stands twice")
    return Vary(path.strip(), texts, tuple(spelled(one, f"{option} {path.strip()}") for one in texts))


def grid(
    table: Mapping[str, Any], varied: Sequence[Vary], methods: Mapping[str, dict[str, Any]] | None = None
) -> list[Cell]:
    """All combinations: scenario by scenario, the first value of each first. Every table is a valid experiment.

    methods: name -> table [method], in place of the experiment's own. Errors: `ConfigError`, `UnknownName` with the path.
    """
    twice = sorted({vary.path for vary in varied if [other.path for other in varied].count(vary.path) > 1})
    require(not twice, f"--vary: {', '.join(twice)} stands twice; write its values in one list")
    chosen: dict[str, dict[str, Any] | None] = {**methods} if methods else {str(table.get("name", "run")): None}
    cells = []
    for scenario in _combined([vary for vary in varied if not vary.of_method]):
        for (name, parts), setting in itertools.product(chosen.items(), _combined([v for v in varied if v.of_method])):
            found = copy.deepcopy(dict(table))
            if parts is not None:
                found["method"] = copy.deepcopy(parts)
            for vary, place in (*scenario, *setting):
                config.set_path(found, vary.path, copy.deepcopy(vary.values[place]))
            said = _said(setting)
            method = said if methods is None and said else ", ".join(filter(None, (name, said)))
            experiment = config.from_table(found | {"seed": 0, "name": method})
            base = name if methods else ""
            cells.append(Cell(method, _said(scenario, always=True), config.to_table(experiment), base))
    folders = [cell.folder for cell in cells]
    clash = sorted({name for name in folders if folders.count(name) > 1})
    if clash:
        raise ConfigError(f"--vary: several combinations would be called {clash[0]!r}; give values other names")
    return cells


def _combined(varied: Sequence[Vary]) -> list[list[tuple[Vary, int]]]:
    return [list(zip(varied, places, strict=True)) for places in itertools.product(*(range(len(v.values)) for v in varied))]


def _said(setting: Sequence[tuple[Vary, int]], always: bool = False) -> str:
    """ "codec=quantize4, sync=fda"; one value that says itself stands alone: "quantize4"."""
    if len(setting) == 1 and not always and not isinstance(setting[0][0].values[0], int | float):
        return setting[0][0].texts[setting[0][1]]
    return ", ".join(f"{vary.short}={vary.texts[place]}" for vary, place in setting)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-") or "run"
