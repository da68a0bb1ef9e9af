"""Dynamic synchronisation in a report: numbers by hand, records with holes, and pages without it that stay as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from report.folders import EVIL, make
from taciturn.report import read_run
from taciturn.report.drift import Seen, drift_figures, looks, relative_drift, sync_facts
from taciturn.report.page import embed, render
from taciturn.report.plot import COLORS, Figure
from taciturn.report.read import Run
from taciturn.report.tables import methods
from taciturn.report.words import say

NAN, INF = math.nan, math.inf
PRICE = {"step_seconds": 0.01, "up": 1.25e6, "down": 6.25e6, "latency": 0.05}


def fda(blocks: float, *seen: tuple[float, ...], drift: tuple[float, ...] = (1.0, 3.0), **more: Any) -> dict[str, Any]:
    """What the rule tells of a round; seen: blocks, H and Theta of each look."""
    table = [dict(zip(("blocks", "estimate", "threshold"), look, strict=True)) for look in seen]
    told = {"blocks": blocks, "variance": 0.1, "rho": 10.1, "price": PRICE, "drift": list(drift), "looks": table}
    return told | {"next": {"theta": 0.2, "p": 0.7}} | more


def run_of(folder: Path, *sync: dict[str, Any] | None, **header: Any) -> Run:
    return read_run(make(folder, [0.5] * len(sync), sync=sync, **header))


def figures_of(*runs: Run) -> dict[str, Figure]:
    return {figure.key: figure for figure in drift_figures(methods(runs))}


def test_a_report_of_fixed_rules_has_none_of_it(tmp_path: Path) -> None:
    old, fixed = run_of(tmp_path / "old", None, None), run_of(tmp_path / "fixed", {}, {}, name="fixed")
    assert "sync" not in old.rounds[0] and fixed.rounds[0]["sync"] == {}
    assert drift_figures(methods([old, fixed])) == [] and sync_facts(methods([fixed])[0]) == {}
    page = render([old, fixed])
    assert "Local work of each round" not in page and "Who drifted" not in page and "price in use" not in page
    assert list(figures_of(old, run_of(tmp_path / "dynamic", fda(1.0), name="fda"))) == ["work", "looks", "drift"]


def test_local_work_is_a_mean_over_seeds_and_leaves_out_fixed_rules(tmp_path: Path) -> None:
    seeds = [run_of(tmp_path / str(s), fda(1.0 + s), None, fda(3.0 + s), name="fda", seed=s) for s in (0, 1)]
    fixed = run_of(tmp_path / "fixed", None, None, None)
    figure = figures_of(fixed, *seeds)["work"]
    assert figure.plot is not None
    band, line = figure.plot.data
    assert (line.x, line.y, line.name) == ((1, 3), (1.5, 3.5), "fda (2 seeds)")
    assert line.line.color == COLORS[1] and band.fill == "toself"  # the color that the method has in every figure
    assert "one standard deviation" in figure.caption.en and "fixed amount of local work are not shown" in figure.caption.en
    alone = figures_of(run_of(tmp_path / "alone", fda(1.0)))["work"]
    assert "Bands" not in alone.caption.en and "not shown" not in alone.caption.en


def test_a_look_stands_at_the_fraction_of_its_round(tmp_path: Path) -> None:
    first = fda(2.0, (0.5, 0.1, -INF), (2.0, 0.4, 0.3))
    second = fda(4.0, (1.0, NAN, 0.5), (3.0, 0.0, INF), (9.0, 0.6, NAN))
    run = run_of(tmp_path / "a", first, None, second)
    assert looks(run) == [
        Seen(0.25, 1, 0.5, 0.1, None),
        Seen(1.0, 1, 2.0, 0.4, 0.3),
        Seen(2.25, 3, 1.0, None, 0.5),
        Seen(2.75, 3, 3.0, None, None),
        Seen(3.0, 3, 9.0, 0.6, None),  # never beyond its round
    ]
    h, theta = figures_of(run)["looks"].plot.data  # type: ignore[union-attr]
    assert (h.x, h.y, h.name, h.mode) == ((0.25, 1.0, 3.0), (0.1, 0.4, 0.6), "H, fedavg", "lines+markers")
    assert (theta.x, theta.y, theta.name, theta.line.dash) == ((1.0, 2.25), (0.3, 0.5), "Θ, fedavg", "dash")
    assert h.line.color == theta.line.color and h.line.dash == "solid"
    assert looks(run_of(tmp_path / "b", fda(NAN, (1.0, 0.1, 0.2)), fda(0.0, (0.0, 0.1, 0.2)))) == []


def test_looks_and_drifts_are_those_of_the_first_seed(tmp_path: Path) -> None:
    drifts = ((1.0, 3.0), (2.0, 2.0))
    runs = [run_of(tmp_path / str(s), fda(1.0, (1.0, 1.0 + s, 2.0), drift=drifts[s]), seed=s) for s in (0, 1)]
    found = figures_of(*runs)
    assert found["looks"].plot.data[0].y == (1.0,) and found["drift"].plot.data[0].x == (1.5, 0.5)  # type: ignore[union-attr]
    assert "First seed" in found["looks"].caption.en and "First seed" in found["drift"].caption.en
    alone = figures_of(runs[0])
    assert "First seed" not in alone["looks"].caption.en + alone["drift"].caption.en


def test_clients_that_stop_themselves_have_no_looks(tmp_path: Path) -> None:
    found = figures_of(run_of(tmp_path / "local", fda(2.0), fda(3.0)))
    assert found["looks"].plot is None and "stop themselves" in found["looks"].caption.en
    assert found["work"].plot is not None and found["drift"].plot is not None
    assert "stop themselves" in render([run_of(tmp_path / "page", fda(2.0))])


def test_drift_is_relative_to_the_round(tmp_path: Path) -> None:
    rounds = [
        fda(1.0, drift=(1.0, 3.0)),
        fda(1.0, drift=(30.0, 10.0)),  # a round that moved more counts no more
        fda(1.0, drift=(NAN, 5.0)),
        fda(1.0, drift=(INF, -INF)),
        fda(1.0, drift=(0.0, 0.0)),
        fda(1.0, drift=(1e308, 1e308)),  # the sum is not finite
        fda(1.0, drift=(1.0,)),  # not the cohort
        fda(1.0, drift=()),
        None,
    ]
    run = run_of(tmp_path / "a", *rounds)
    found = relative_drift(run)
    assert found == {(0, "client-000"): pytest.approx(1.0), (1, "client-001"): pytest.approx((1.5 + 0.5 + 1.0) / 3)}
    assert figures_of(run_of(tmp_path / "b", fda(1.0, drift=(NAN, NAN))))["drift"].plot is None


def test_who_drifted_shows_both_ends_of_many_clients(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", fda(1.0, drift=tuple(map(float, range(100)))), name="many", cohort=range(100))
    few = run_of(tmp_path / "b", fda(1.0, drift=(0.0, 2.0)), name="few")
    figure = figures_of(run, few)["drift"]
    assert figure.plot is not None
    ticks = figure.plot.layout.yaxis.ticktext
    assert len(ticks) == 40 and ticks[0] == "client-099" and ticks[-1] == "client-000"
    assert "20 that drifted most and the 20 that drifted least, of 100 clients" in figure.caption.en
    first, second = figure.plot.data
    assert len(first.x) == 40 and (second.x, second.y) == ((0.0,), (39,))  # its other client is, in the mean, as the others
    assert first.marker.symbol != second.marker.symbol


def test_what_was_paid_and_watched_is_told(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / str(s), fda(2.0), fda(3.0 + s), seed=s, name="fda", monitor=30) for s in (0, 1)]
    facts = {key: fact.en for key, fact in sync_facts(methods(runs)[0]).items()}
    assert facts == {
        "local_work": "2.75 blocks, 10.5 local steps of the slowest client",
        "price": "0.01 s a local step, 1.25 MB/s up, 6.25 MB/s down, 0.05 s a round trip",
        "rho": "10.1 blocks of local work (last round)",
        "exchanges": "1 round trip",
        "monitoring": "60 B of 600 B, 10 % of all traffic",
    }
    page = render(runs)
    for key, fact in sync_facts(methods(runs)[0]).items():
        row = f"<dt>{say(f'fact_{key}').__html__()}</dt><dd>{fact.__html__()}</dd>"
        assert row in page and facts[key] in row


def test_a_price_with_holes(tmp_path: Path) -> None:
    price = {"step_seconds": None, "up": INF, "down": NAN, "latency": 0.0}
    method = {"method": {"sync": {"name": "fda"}}}
    run = run_of(tmp_path / "a", fda(NAN, rho=NAN, price=price), experiment=method)
    run.rounds[0].update(traffic=None, longest=None)
    assert {key: fact.en for key, fact in sync_facts(methods([run])[0]).items()} == {
        "price": "no limit up, 0 s a round trip (the rule's own: none was given)"
    }
    method["method"]["sync"]["price"] = {"up": 1.0}  # type: ignore[assignment]
    given = run_of(tmp_path / "b", {"blocks": 1.0, "price": PRICE}, experiment=method)
    assert "none was given" not in sync_facts(methods([given])[0])["price"].en
    other = run_of(tmp_path / "c", {"mine": "another rule"}, name=EVIL)
    assert [figure.plot for figure in drift_figures(methods([other]))] == [None] * 3
    assert "exchanges a round</span>" in render([other])


def test_names_are_shown_as_they_are_and_values_are_json(tmp_path: Path) -> None:
    rounds = fda(1.0, (0.5, NAN, INF), (1.0, 0.1, 0.2), drift=(NAN, 1.0)), fda(2.0, (2.0, INF, -INF), drift=(2.0, 1.0))
    run = run_of(tmp_path / "a", *rounds, name=EVIL, clients=[EVIL] * 3)
    page = render([run])
    assert "<script>window" not in page and "<img" not in page
    found = figures_of(run)
    for key in ("work", "looks", "drift"):
        assert all("&lt;" in trace.name and "<script" not in trace.name for trace in found[key].plot.data)  # type: ignore
    assert len(found["drift"].plot.data[0].y) == 2  # type: ignore[union-attr]  # two clients of one name are two rows
    assert "NaN" not in embed(list(found.values())) and "Infinity" not in embed(list(found.values()))
