"""The study from the command line: its files, its figures, and what it refuses."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from taciturn.advisor import STUDIES, study
from taciturn.cli import app
from taciturn.core.errors import ConfigError, UnknownName

runner = CliRunner()
SMALL = ("--set", "steps=100", "--set", "d=9", "--set", "replicas=2", "--set", "points=2", "--set", "panels=5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    out = runner.invoke(app, ["run", "least-squares", "--json", "--out", str(place), "--seed", "3", *SMALL])
    assert out.exit_code == 0, out.output
    return place, json.loads(out.stdout.strip().splitlines()[-1])


def test_summary_and_curves(folder):
    place, summary = folder
    assert summary["series"] == 5 * len(study.CODECS) and summary["folder"] == str(place)
    result = json.loads((place / "study.json").read_text())
    assert result["settings"] == {"steps": 100, "replicas": 2, "d": 9, "seed": 3, "points": 2, "panels": 5}
    for one in result["series"]:
        assert one["steps"][-1] == (100 if one["setting"].startswith("one") else 50)
        assert len(one["steps"]) == len(one["excess"]) == len(one["error"]) and min(one["excess"]) > 0
        assert len(one["prediction"]) == len(one["prediction_steps"]) and one["prediction_kind"] in study_kinds()
        assert one["published"]["steps"] in one["prediction_steps"]


def study_kinds():
    from taciturn.advisor.sheet import KINDS

    return KINDS


def test_page_and_picture(folder):
    place, _ = folder
    page = (place / "study.html").read_text()
    assert page.count('<div class="plot"') == 10 and "src=" not in page.split("<script>")[0]
    figures = page.split("id='figures'>")[1].split("</script>")[0]
    assert len(json.loads(figures)) == 10
    picture = ET.parse(place / "study.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}g")) == 5 + 1


def test_ls_names_it_and_wrong_input_is_refused(tmp_path):
    assert "least-squares" in runner.invoke(app, ["ls"]).stdout
    with pytest.raises(UnknownName, match="did you mean 'steps'"):
        STUDIES["least-squares"](tmp_path, {"step": 3})
    with pytest.raises(ConfigError, match="whole number"):
        STUDIES["least-squares"](tmp_path, {"steps": 1e5})
    with pytest.raises(ConfigError, match="steps: at least 100"):
        STUDIES["least-squares"](tmp_path, {"steps": 10})
    out = runner.invoke(app, ["run", "least-squares", "--rounds", "3", "--engine", "auto"])
    assert isinstance(out.exception, ConfigError) and "--engine, --rounds" in str(out.exception)
    assert not list(tmp_path.iterdir())


def test_codecs_are_matched():
    chosen = study.matched(100)
    omegas = {name: omega for name, (_, omega) in chosen.items()}
    assert omegas == pytest.approx({"none": 0, "quantization": 10, "sparsification": 10, "sketch": 100 / 9 - 1,
                                    "rand-h": 100 / 9 - 1, "PP": 10})  # fmt: skip


def test_published_end_values_follow_from_the_theory():
    """d = 100: the exact recursion at the published K, within the accuracy of reading a figure and of five runs."""
    chosen, apart = study.matched(100), []
    for setting in study.SETTINGS:
        if setting.key not in ("one-diagonal", "one-rotated", "ten-alike") and setting.clients == 1:
            continue
        problem = setting.problem(100)
        for name, log in zip(study.CODECS, setting.published, strict=True):
            draw, omega = chosen[name]
            if log is None or draw.linear_map(100) is None or name in ("sparsification", "rand-h"):
                continue  # the step-by-step ones take seconds
            gamma = setting.gamma(problem, omega, setting.published_steps)
            found = study.predicted(setting, problem, draw, omega, gamma, [setting.published_steps])[1][0]
            apart.append(abs(math.log10(found) - log))
    assert len(apart) > 20 and sorted(apart)[len(apart) // 2] < 0.1 and max(apart) < 0.5


def test_log_points():
    assert study.log_points(100_000, 1) == [10, 100, 1000, 10_000, 100_000]
    points = study.log_points(5000, 7)
    assert points == sorted(set(points)) and points[0] == 10 and points[-1] == 5000


@pytest.mark.slow
def test_every_setting_runs(tmp_path):
    summary = STUDIES["least-squares"](tmp_path, {"steps": 100, "d": 9, "replicas": 2, "points": 2})
    assert summary["series"] == len(study.SETTINGS) * len(study.CODECS)
    kinds = {one["prediction_kind"] for one in json.loads((tmp_path / "study.json").read_text())["series"]}
    assert kinds == set(study_kinds())
