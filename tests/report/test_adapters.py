"""Low-rank aggregation in a report: numbers by hand, records with holes, and pages without it that stay as they were."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from report.folders import EVIL, make
from taciturn.aggregation.mismatch import Mismatch
from taciturn.report import read_run
from taciturn.report.adapters import FIGURES, THIN, adapter_figures, told
from taciturn.report.page import embed, render
from taciturn.report.plot import COLORS, Figure
from taciturn.report.read import Run
from taciturn.report.tables import methods

NAN, INF = math.nan, math.inf
KEYS = ["adapters", "product", "truncation", "client_gap", "factor_gaps", "imbalance", "ranks"]


def layer(scale: float, **more: Any) -> dict[str, Any]:
    """What an operator tells of a layer: all values alike, but for those given."""
    return {field.name: scale for field in fields(Mismatch)} | more


def run_of(folder: Path, *aggregate: dict[str, Any] | None, **header: Any) -> Run:
    return read_run(make(folder, [0.5] * len(aggregate), aggregate=aggregate, **header))


def figures_of(*runs: Run) -> dict[str, Figure]:
    return {figure.key: figure for figure in adapter_figures(methods(runs))}


def test_a_report_without_adapters_has_none_of_it(tmp_path: Path) -> None:
    old, mean = run_of(tmp_path / "old", None, None), run_of(tmp_path / "mean", {}, {}, name="mean")
    other = run_of(tmp_path / "other", {"kept": 3.0}, {"encoder": {"mine": 1.0}}, name="another aggregator")
    assert "aggregate" not in old.rounds[0] and mean.rounds[0]["aggregate"] == {}
    assert adapter_figures(methods([old, mean, other])) == []
    assert "What aggregation does" not in render([old, mean, other])
    assert list(figures_of(old, run_of(tmp_path / "lora", {"a": layer(1.0)}, name="lora"))) == KEYS


def test_every_value_is_one_that_the_diagnostics_have() -> None:
    assert {value for shown in FIGURES for value in shown.values} <= {field.name for field in fields(Mismatch)}


def test_few_layers_are_thin_lines_around_their_median(tmp_path: Path) -> None:
    rounds = [{"a": layer(k), "b": layer(3 * k), "c": layer(2 * k)} for k in (1.0, 2.0)]
    plot = figures_of(run_of(tmp_path / "a", *rounds))["product"].plot
    assert plot is not None
    *thin, median = plot.data
    assert [(line.y, line.showlegend) for line in thin] == [((1.0, 2.0), False), ((3.0, 6.0), False), ((2.0, 4.0), False)]
    assert all(name == line.text for name, line in zip("abc", thin, strict=True))
    assert (median.x, median.y, median.name) == ((1, 2), (2.0, 4.0), "fedavg")
    assert list(median.customdata[1]) == [3, "6", "b"] and "median of %{customdata[0]} layers" in median.hovertemplate
    assert plot.layout.yaxis.type == "log" and plot.layout.height is None  # the page gives the height
    assert {line.line.color for line in plot.data} == {COLORS[0]} and median.line.width > thin[0].line.width


def test_many_layers_are_a_range_and_one_layer_is_a_line(tmp_path: Path) -> None:
    many = {f"layer.{k}": layer(1.0 + k) for k in range(THIN + 1)}
    band, median = figures_of(run_of(tmp_path / "many", many, many))["imbalance"].plot.data  # type: ignore[union-attr]
    assert band.fill == "toself" and band.y == (13.0, 13.0, 1.0, 1.0) and band.x == (1, 2, 2, 1)
    assert median.y == (7.0, 7.0) and "layer.12" in median.customdata[0]
    (line,) = figures_of(run_of(tmp_path / "one", {"head": layer(1.0)}))["imbalance"].plot.data  # type: ignore[union-attr]
    assert line.text == "head" and "%{text}" in line.hovertemplate


def test_pairs_of_values_are_solid_and_dashed(tmp_path: Path) -> None:
    found = figures_of(run_of(tmp_path / "a", {"a": layer(1.0, raw=5.0, entropy_mean=9.0)}))
    solid, dashed = found["factor_gaps"].plot.data  # type: ignore[union-attr]
    assert (solid.y, solid.line.dash, solid.name) == ((1.0,), "solid", "fedavg, up to a rotation")
    assert (dashed.y, dashed.line.dash, dashed.name) == ((5.0,), "dash", "fedavg, as they are")
    assert found["ranks"].plot.data[1].y == (9.0,) and found["ranks"].plot.layout.yaxis.type is None  # type: ignore[union-attr]


def test_methods_stand_side_by_side_in_their_colors(tmp_path: Path) -> None:
    plain = run_of(tmp_path / "plain", None, None, name="whole model")
    seeds = [run_of(tmp_path / str(s), {"a": layer(1.0 + s)}, {"a": layer(2.0)}, name="svd", seed=s) for s in (0, 1)]
    mean = run_of(tmp_path / "mean", {"a": layer(4.0)}, None, name="factor mean")
    found = figures_of(plain, *seeds, mean)
    first, second = found["product"].plot.data  # type: ignore[union-attr]
    assert (first.name, first.y, first.line.color) == ("svd", (1.0, 2.0), COLORS[1])
    assert (second.name, second.x, second.line.color) == ("factor mean", (1,), COLORS[2])
    assert "First seed" in found["adapters"].caption.en and "First seed" not in figures_of(mean)["adapters"].caption.en
    page = render([plain, *seeds, mean])
    assert page.index("Training loss over rounds") < page.index("What aggregation does") < page.index("Traffic by kind")


def test_holes_are_left_out(tmp_path: Path) -> None:
    rounds = [
        {"a": layer(1.0, product=0.0, raw=NAN), "b": layer(2.0, product=INF)},
        None,
        {"a": layer(3.0, raw=None), "b": None, "c": "text"},
        {"a": {}},
    ]
    run = run_of(tmp_path / "a", *rounds)
    assert told(run, "product") == {"a": {1: 0.0, 3: 3.0}}
    assert told(run, "product", logarithmic=True) == {"a": {3: 3.0}}
    assert told(run, "clients") == {"a": {1: 1.0, 3: 3.0}, "b": {1: 2.0}}
    found = figures_of(run)
    assert [line.name for line in found["factor_gaps"].plot.data if line.showlegend] == [  # type: ignore[union-attr]
        "fedavg, up to a rotation",
        "fedavg, as they are",
    ]
    nothing = run_of(tmp_path / "b", {"a": {"clients": 1.0}})
    assert figures_of(nothing)["product"].plot is None and "No run recorded it" in render([nothing])


@pytest.mark.parametrize("layers", [1, 2, THIN + 1])
def test_names_are_shown_as_they_are_and_values_are_json(tmp_path: Path, layers: int) -> None:
    held = {f"{EVIL}{k}": layer(1.0, raw=NAN, gauge=INF) for k in range(layers)}
    run = run_of(tmp_path / "a", held, held, name=EVIL)
    page = render([run])
    assert "<script>window" not in page and "<img" not in page
    found = figures_of(run)
    for line in found["product"].plot.data:  # type: ignore[union-attr]
        assert "<script" not in f"{line.name}{line.text}{line.hovertemplate}{line.customdata}"
    assert found["factor_gaps"].plot is None
    assert "NaN" not in embed(list(found.values())) and "Infinity" not in embed(list(found.values()))
