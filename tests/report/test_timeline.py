"""Simulated time in a report: numbers by hand, and old records, which have none."""

from __future__ import annotations

import json

import pytest

from report.folders import make
from taciturn.report import read_run, summary
from taciturn.report.page import embed, render
from taciturn.report.tables import human_seconds, methods, seconds_to, time_curve
from taciturn.report.timeline import fleet_facts, shown_round, timeline_figures

FLEET = {"profiles": ["phone", "server"], "clients": [2, 1], "step_seconds": [0.5, 0.25], "step_flops": 7}


def timed(folder, values, seconds, *, clients=2, **more):
    """A run whose rounds take these seconds; client i computes i + 1 s and waits for the last."""
    path = make(folder, values, cohort=range(clients), fleet=FLEET, **more)
    lines, total = [json.loads(line) for line in (path / "record.jsonl").read_text().splitlines()], 0.0
    for line, took in zip(lines, seconds, strict=True):
        total += took
        phases = {"down": [1.0] * clients, "compute": [i + 1.0 for i in range(clients)], "up": [2.0] * clients}
        phases["wait"] = [float(clients - 1 - i) for i in range(clients)]
        line["simulated"] = {"total": total, "round": took, "device": [i % 2 for i in range(clients)], **phases}
    (path / "record.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return read_run(path)


def test_old_records_have_no_time_and_render(tmp_path):
    run = read_run(make(tmp_path / "a", [0.5, 0.9]))
    page = render([run])
    assert run.simulated is None and time_curve(run) == [] and timeline_figures(methods([run])) == []
    assert fleet_facts(methods([run])[0]) == {} and "over simulated time" not in page and "A round of" not in page
    assert "<th>simulated" not in page


def test_the_metric_over_simulated_time(tmp_path):
    run = timed(tmp_path / "a", [0.5, None, 0.9], [100.0, 50.0, 150.0])
    assert time_curve(run) == [(1, 0.5, 100.0), (3, 0.9, 300.0)] and run.simulated == 300.0
    assert (seconds_to(run, 0.6), seconds_to(run, 0.5), seconds_to(run, 0.99)) == (300.0, 100.0, None)
    row = summary([run], 0.6)[0]
    assert (row["simulated"], row["simulated_to_target"]) == (300.0, 300.0)
    page = render([run], 0.6)
    assert "Accuracy over simulated time" in page and "simulated time (min)" in page and "5\u00a0min" in page


def test_old_and_new_records_stand_in_one_page(tmp_path):
    old, new = read_run(make(tmp_path / "a", [0.5])), timed(tmp_path / "b", [0.6], [9.0], name="new")
    rows = summary([old, new])
    assert [row["simulated"] for row in rows] == [None, 9.0] and "over simulated time" in render([old, new])


def test_a_round_shows_who_does_what(tmp_path):
    run = timed(tmp_path / "a", [0.5] * 3, [9.0, 5.0, 7.0], dropped={3: "after the deadline"})
    line = shown_round(run)
    assert line["round"] == 3, "the one of median duration"
    (figure,) = timeline_figures(methods([run]))
    assert [bar.name for bar in figure.plot.data] == ["receives", "computes", "sends", "waits"]
    assert len({(bar.marker.color, bar.marker.pattern.shape) for bar in figure.plot.data}) == 4
    assert list(figure.plot.data[1].x) == [2.0, 1.0], "the slowest on top"
    assert figure.plot.layout.yaxis.ticktext[0].replace("<br>", " ") == "client-001 (after the deadline)"
    assert figure.plot.data[1].customdata[0][1:] == ["server", "2 s"] and embed([figure])
    assert "Round 3, the one of median duration, took 7 s" in figure.caption.en


def test_many_clients_are_cut_to_the_slowest_and_the_quickest(tmp_path):
    (figure,) = timeline_figures(methods([timed(tmp_path / "a", [0.5], [99.0], clients=60)]))
    shown = list(figure.plot.data[1].x)
    assert shown == [float(60 - i) for i in range(12)] + [float(12 - i) for i in range(12)]
    assert "The 12 slowest and the 12 quickest of 60 clients" in figure.caption.en


def test_devices_and_deadline_in_words(tmp_path):
    asked = {"experiment": {"deadline": 90.0, "late": "drop"}}
    (group,) = methods([timed(tmp_path / "a", [0.5], [9.0], **asked)])
    assert {key: fact.en for key, fact in fleet_facts(group).items()} == {
        "devices": "2 phone, a step 0.5 s; 1 server, a step 0.25 s",
        "deadline": "90 s a round; late clients are left out",
    }


@pytest.mark.parametrize(("seconds", "words"), [(0.0, "0 s"), (119.0, "119 s"), (240.0, "4 min"), (3e5, "3.47 d")])
def test_times_read_well(seconds, words):
    assert human_seconds(seconds) == words
