"""The report: numbers by hand, folders that are wrong, text that is hostile, and a browser that draws the page."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report.folders import CONFIG, EVIL, make
from taciturn.core.errors import RunError
from taciturn.report import read_run, summary, write_report
from taciturn.report.figures import figures
from taciturn.report.page import render, toml
from taciturn.report.tables import (
    bytes_to,
    clients_of,
    common_target,
    final_error,
    human_bytes,
    left_out,
    methods,
    rounds_to,
    traffic_saved,
    worst_decile,
)


def test_rounds_and_bytes_to_target_use_the_first_evaluated_round(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "a", [None, 0.5, None, 0.8, 0.7]))
    assert (rounds_to(run, 0.5), bytes_to(run, 0.5)) == (2, 600)
    assert (rounds_to(run, 0.6), bytes_to(run, 0.6)) == (4, 1200)
    assert (rounds_to(run, 0.9), bytes_to(run, 0.9)) == (None, None)
    assert (rounds_to(run, None), bytes_to(run, None)) == (None, None)
    assert final_error(run) == pytest.approx(0.3)
    assert (run.bytes_up, run.bytes_down, run.bytes_evaluate, run.seconds) == (500, 1000, 250, 2.5)


def test_goal_min_turns_every_comparison(tmp_path: Path) -> None:
    metric = {"name": "perplexity", "goal": "min"}
    run = read_run(make(tmp_path / "a", [40.0, 20.0, 10.0], metric=metric, per_client=[5.0, 9.0, 30.0]))
    assert rounds_to(run, 20.0) == 2
    assert common_target([run]) == pytest.approx(10.2)
    assert final_error(run) == 10.0
    assert worst_decile(run) == 30.0
    page = render([run])
    assert "reached perplexity 10.2 after 3 rounds" in page and "final error" not in page


@pytest.mark.parametrize(
    ("clients", "worst"),
    [([0.5], 0.5), ([0.9, 0.1, 0.5], 0.1), ([i / 100 for i in range(20)], 0.005), ([i / 100 for i in range(21)], 0.01)],
)
def test_worst_decile_is_the_mean_of_the_worst_tenth_rounded_up(tmp_path: Path, clients: list[float], worst: float) -> None:
    assert worst_decile(read_run(make(tmp_path / "a", [0.5], per_client=clients))) == pytest.approx(worst)


def test_clients_without_a_value_are_no_clients(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "a", [0.5], per_client=[0.7, None, float("nan"), 0.3]))
    assert clients_of(run) == [("client-000", 0.7), ("client-003", 0.3)]
    assert worst_decile(read_run(make(tmp_path / "b", [0.5]))) is None


def test_target_given_then_configured_then_from_the_baseline(tmp_path: Path) -> None:
    plain = read_run(make(tmp_path / "a", [0.5, 0.9, 0.8]))
    aims = read_run(make(tmp_path / "b", [0.5], target=0.75))
    assert common_target([plain, aims]) == pytest.approx(0.98 * 0.9)
    assert common_target([aims, plain]) == 0.75
    assert common_target([aims, plain], 0.6) == 0.6
    assert common_target([read_run(make(tmp_path / "c", [None]))]) is None
    loss = {"name": "log likelihood", "goal": "max"}
    assert common_target([read_run(make(tmp_path / "d", [-2.0, -1.0], metric=loss))]) == pytest.approx(-1.02)


def test_summary_compares_with_the_first_run(tmp_path: Path) -> None:
    base = read_run(make(tmp_path / "a", [0.5, 0.8, 1.0], up=100, down=200))
    half = read_run(make(tmp_path / "b", [0.5, 0.9, 1.0], up=50, down=100, name="half", dropped={2: "not finite"}))
    never = read_run(make(tmp_path / "c", [0.1, 0.2, 0.3], up=10, down=20, name="never"))
    first, second, third = summary([base, half, never], target=0.9)
    assert (first["rounds_to_target"], first["bytes_to_target"], first["ratio"]) == (3, 900, 1.0)
    assert (first["traffic_saved"], first["final_error"], first["left_out"]) == (0.0, 0.0, 0)
    assert (second["rounds_to_target"], second["bytes_to_target"], second["ratio"]) == (2, 300, 3.0)
    assert second["traffic_saved"] == pytest.approx(2 / 3) and second["traffic_saved_basis"] == "to the target"
    assert (second["rounds"], second["bytes_up"], second["bytes_down"], second["seconds"]) == (3, 150, 300, 1.5)
    assert second["left_out"] == left_out(half) == 1
    assert third["rounds_to_target"] is third["bytes_to_target"] is third["ratio"] is None
    assert third["ratio_reason"] == "never: did not reach the target"
    assert (third["traffic_saved"], third["traffic_saved_basis"]) == (0.9, "whole run")


def test_seeds_of_one_name_are_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    runs = [read_run(make(tmp_path / str(s), [0.5, 0.8 + s / 10], seed=s, per_client=[0.4 + s / 10])) for s in (0, 1)]
    (row,) = summary(runs, target=0.75)
    assert row["seeds"] == [0, 1] and row["reached"] == 2
    assert row["final"] == pytest.approx(0.85) and row["spread"]["final"] == pytest.approx(0.1 / 2**0.5)
    assert row["worst_decile"] == pytest.approx(0.45)
    (row,) = summary(runs, target=0.85)
    assert row["reached"] == 1 and row["rounds_to_target"] is None
    assert row["ratio_reason"] == "fedavg: 1 of 2 seeds reached the target"
    assert "fedavg reached 85.0\u00a0% accuracy with 1 of 2 seeds only in 2 rounds" in render(runs, 0.85)


def test_a_seed_twice_is_two_rows_and_metrics_do_not_mix(tmp_path: Path) -> None:
    runs = [read_run(make(tmp_path / name, [0.5])) for name in ("one", "two")]
    assert [group.label for group in methods(runs)] == ["fedavg (one)", "fedavg (two)"]
    other = read_run(make(tmp_path / "three", [0.5], metric={"name": "loss", "goal": "min"}))
    with pytest.raises(RunError, match="write a report for each metric"):
        summary([runs[0], other])
    with pytest.raises(RunError, match="at least one"):
        summary([])


def test_a_method_that_sends_nothing_has_no_ratio(tmp_path: Path) -> None:
    base = read_run(make(tmp_path / "a", [0.9]))
    local = read_run(make(tmp_path / "b", [0.9], name="local", up=0, down=0))
    row = summary([base, local])[1]
    assert row["ratio"] is None and row["ratio_reason"] == "local: sent nothing" and row["traffic_saved"] == 1.0
    assert traffic_saved([base], [local], 0.5).fraction is None
    assert "local" in render([local])  # nothing to show on a logarithmic axis


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [0.5, 0.6, 0.7])
    record = folder / "record.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:2]) + lines[2][:25] + b"\xc3")
    assert [line["round"] for line in read_run(folder).rounds] == [1, 2]
    record.write_bytes(lines[0] + lines[1][:25] + b"\n" + lines[2])
    with pytest.raises(RunError, match=r"record\.jsonl: line 2 is not a round"):
        read_run(folder)


def test_repeated_rounds_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [0.5, 0.6, 0.7])
    record = folder / "record.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join([*lines, lines[1].replace("0.6", "0.65")]))
    run = read_run(folder)
    assert [(line["round"], line["metrics"]["accuracy"]) for line in run.rounds] == [(1, 0.5), (2, 0.65)]


def test_folders_that_are_not_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{tmp_path} is not a run folder"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="written in format 7; this version reads format 1"):
        read_run(make(tmp_path / "format", [0.5], format=7))
    with pytest.raises(RunError, match="has no rounds"):
        read_run(make(tmp_path / "rounds", []))
    with pytest.raises(RunError, match="goal of max or min"):
        read_run(make(tmp_path / "goal", [0.5], metric={"name": "accuracy", "goal": "up"}))
    broken = make(tmp_path / "broken", [0.5])
    (broken / "record.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(RunError, match="in round 1, 'bytes_up' is None"):
        read_run(broken)
    (broken / "record.jsonl").unlink()
    with pytest.raises(RunError, match=r"record\.jsonl is missing"):
        read_run(broken)
    (broken / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot read"):
        read_run(broken)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (2.5e9, "2.5 GB")]
)
def test_bytes_have_si_units(count: float, shown: str) -> None:
    assert human_bytes(count) == shown


def test_the_configuration_is_toml() -> None:
    assert tomllib.loads(toml(CONFIG)) == {**CONFIG, "method": {"codec": CONFIG["method"]["codec"]}}
    odd = {"a key": {"x.y": [{"n": 1}, {"n": 2.5}]}, "empty": {}, "text": 'li"ne\n\x7f'}
    assert tomllib.loads(toml(odd)) == odd


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def hostile(folder: Path) -> Path:
    text = {
        "engine": {"name": EVIL, "path": EVIL, "why": EVIL},
        "versions": {EVIL: EVIL},
        "experiment": {EVIL: {"a": EVIL}},
    }
    names = {"clients": [EVIL] * 3, "metric": {"name": EVIL, "goal": "max"}, "note": EVIL}
    return make(folder, [0.5, 0.9], name=EVIL, per_client=[0.2, 0.4, 0.6], dropped={1: EVIL}, **text, **names)


def test_the_page_escapes_every_text_and_loads_nothing(tmp_path: Path) -> None:
    out = write_report([hostile(tmp_path / "evil")], tmp_path / "new" / "folder" / "report.html")
    page = out.read_text(encoding="utf-8")
    assert "<script>window" not in page and "<img" not in page and "</script><img" not in page
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 3
    assert not [tag for tag, attrs in tags if {"src", "href", "onerror", "onload"} & set(attrs)]
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "default-src 'none'" in page  # the browser refuses what the lines above may have missed


def test_the_page_says_the_result_first_and_how_to_repeat_it(tmp_path: Path) -> None:
    base = make(tmp_path / "a", [0.5, 0.95], name="FedAvg", up=1_000_000, down=2_100_000)
    half = make(tmp_path / "b", [0.5, 0.95], name="FedAvg in float16", up=500_000, down=1_050_000, note="half")
    page = write_report([base, half], tmp_path / "report.html", target=0.95).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", page)
    assert "FedAvg reached 95.0 % accuracy after 2 rounds with 6.2 MB." in text
    assert "FedAvg in float16 reached 95.0 % accuracy after 2 rounds with 3.1 MB, 50 % less than FedAvg." in text
    assert text.index("50 % less") < text.index("<table")
    for part in (
        "taciturn run config.toml",
        "faster when measured",
        "torch 2.9.0",
        "to = &#34;float16&#34;",
        "up</span>",
    ):
        assert part in text
    assert page.count("plotly.js v") == 1


def test_other_configurations_are_other_rows_and_differences_are_told(tmp_path: Path) -> None:
    asked = [{"lr": 1, "seed": 0, "engine": "auto"}, {"lr": 1, "seed": 1, "engine": "loopback"}, {"lr": 2, "seed": 2}]
    runs = [read_run(make(tmp_path / f"r{s}", [0.5], seed=s, experiment=table)) for s, table in enumerate(asked)]
    assert [(g.label, len(g.runs)) for g in methods(runs)] == [("fedavg (r0)", 2), ("fedavg (r2)", 1)]
    page = render(runs)
    assert "<code>lr: 2, 1</code>" in page and "<code>seed" not in page
    told = page.index("more than the seed:")
    assert 0 < page.index("<ul><li><code>engine: &#34;auto&#34;, &#34;loopback&#34;</code></li></ul>") - told < 200


def test_the_configuration_file_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [0.5], measured_on="the server's test set")
    (folder / "config.toml").write_text("# my own words\nrounds = 4\n")
    other = make(tmp_path / "b", [0.5], name="other", measured_on="the clients' test data")
    page = render([read_run(folder), read_run(other)])
    assert "<pre># my own words\nrounds = 4</pre>" in page
    assert "not measured on the same data: the server&#39;s test set, the clients&#39; test data" in page


def test_runs_without_measurements_still_make_a_page(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "a", [None]))
    run.rounds[0].update(loss=None, traffic=None)
    assert [figure.plot for figure in figures(methods([run]), {})] == [None] * 5
    assert "there is no target to hold it to" in render([run])


def test_an_unwritable_file_is_named_and_an_old_one_stays(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [0.5])
    (tmp_path / "file").write_text("old")
    with pytest.raises(RunError, match=r"cannot write .*report\.html"):
        write_report([folder], tmp_path / "file" / "report.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*taken"):
        write_report([folder], tmp_path / "taken")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file", "taken"]  # no partial file


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no chromium or google-chrome on the path to draw the page")
def test_a_browser_draws_every_figure_without_an_error(tmp_path: Path) -> None:
    folders = [hostile(tmp_path / "evil")]
    metric = {"name": EVIL, "goal": "max"}
    folders += [make(tmp_path / f"s{s}", [0.4, 0.8], seed=s, name="2024", metric=metric, per_client=[0.5]) for s in (0, 1)]
    look = {"blocks": 1.0, "estimate": 0.1, "threshold": float("inf")}
    told = {"blocks": 2.0, "drift": [1.0, float("nan")], "looks": [look, look | {"blocks": 2.0, "threshold": 0.05}]}
    folders.append(make(tmp_path / "fda", [0.4, 0.8], name="fda", metric=metric, sync=[told, told]))
    layer = dict.fromkeys(("product", "clients", "raw", "gauge", "truncation", "imbalance", "entropy_sent"), 0.1)
    layers = [{EVIL: layer, "b": layer | {"product": float("nan")}}] * 2
    folders.append(make(tmp_path / "lora", [0.4, 0.8], name="lora", metric=metric, aggregate=layers))
    out = write_report(folders, tmp_path / "report.html")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=5000 --dump-dom"
    command = [str(browser()), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"{out.as_uri()}#ja"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    plots = re.findall(r'<div class="plot js-plotly-plot" id="plot-(\w+)"', done.stdout)
    ours = ["product", "truncation", "client_gap", "factor_gaps", "imbalance", "ranks"]
    assert plots == ["frontier", "rounds", "bytes", "traffic", "clients", "loss", "work", "looks", "drift", *ours]
    parts = re.split(r'<div class="plot js-plotly-plot"', done.stdout)[1:]
    assert all('<svg class="main-svg"' in part for part in parts)
    assert '<html lang="ja">' in done.stdout and done.stdout.count(">通信ラウンド</text>") == len(ours) + 4
    assert "<img" not in done.stdout and "&lt;script&gt;window" in parts[0]
