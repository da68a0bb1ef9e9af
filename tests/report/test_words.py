"""Two languages: no text lacks one, fields agree, names stay as they are, and sentences say what the numbers say."""

from __future__ import annotations

import ast
import json
import re
import string
from pathlib import Path

import pytest

import taciturn.report
from report.folders import EVIL, make
from taciturn.report import read_run
from taciturn.report.frontier import frontier_figures
from taciturn.report.page import outcome_figures, render
from taciturn.report.sentences import lead, sentence
from taciturn.report.tables import methods, summary
from taciturn.report.words import CATALOGUE, LANGUAGES, known, listed, passage, say

ROOM = Path(taciturn.report.__file__).parent
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
ALIKE = {"product_axis", "truncation_axis", "dual_axis", "imbalance_axis", "percent_of_metric", "value_of_metric"}
ALIKE |= {
    "title_where",
    "axis_percent",
    "title_of_scenario",
    "way_of",
    "client_why",
    "stop",
    "price_rate",
}  # formulas and punctuation


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


@pytest.mark.parametrize("key", CATALOGUE)
def test_every_key_has_both_languages_with_the_same_fields(key):
    templates = CATALOGUE[key]
    assert set(templates) - {"one"} == set(LANGUAGES) and all(templates.values())
    assert {frozenset(fields(text)) for name, text in templates.items() if name != "one"} == {
        frozenset(fields(templates["en"]))
    }
    assert fields(templates.get("one", "")) <= fields(templates["en"])
    assert not JAPANESE.search(templates["en"]) and (key in ALIKE or JAPANESE.search(templates["ja"]))


def test_every_text_that_the_source_asks_for_is_there_and_no_other():
    asked: set[str] = set(re.findall(r'say\("(\w+)"', (ROOM / "page.html.jinja").read_text()))
    shapes: set[str] = set()
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "_title"):
                for text in node.args[:2]:
                    if isinstance(text, ast.JoinedStr):
                        shapes.add("".join(p.value if isinstance(p, ast.Constant) else r"\w+" for p in text.values))
                    elif isinstance(text, ast.Constant) and isinstance(text.value, str):
                        asked.add(text.value)
    assert not {key for key in asked if re.fullmatch(r"[a-z_]+", key)} - set(CATALOGUE)
    held = {key for key in CATALOGUE if ":" not in key}
    dynamic = {key for key in held if any(re.fullmatch(shape, key) for shape in shapes if shape != r"\w+")}
    named = set(re.findall(r'"(\w+)"', "".join(file.read_text() for file in ROOM.glob("*.py"))))
    assert held <= asked | dynamic | named, held - asked - dynamic - named


def test_words_are_filled_in_and_joined():
    assert (say("rounds", n=1).en, say("rounds", n=2).en, say("rounds", n="1.5").ja) == (
        "1 round",
        "2 rounds",
        "1.5 ラウンド",
    )
    assert passage(say("none"), None, say("n_more", n=3)).en == "None. And 3 more."
    assert passage(say("none"), say("n_more", n=3)).ja == "ありません。ほか 3 件。"
    assert listed(["a", say("way: up")]).ja == "a、上り"
    assert known("kind", "update").ja == "更新" and known("kind", "{0.__class__}") == "{0.__class__}"
    assert say("way_of", name="{way} {0}", way="up").en == "up: {way} {0}", "fields are no templates"
    title = "metric_over_rounds"
    assert say(title, metric=known("metric", "accuracy")).ja == "ラウンドごとの正解率"
    assert say(title, metric=known("metric", "mae")).ja == "ラウンドごとの mae", "Latin letters keep their space"


def rows_of(tmp_path, *runs, target=0.9):
    return summary([read_run(make(tmp_path / f"r{k}", values, **more)) for k, (values, more) in enumerate(runs)], target)


BASE = ([0.5, 0.95], {"name": "base", "up": 1000, "down": 1000, "per_client": [0.8, 0.9]})


@pytest.mark.parametrize(
    ("values", "more", "english", "japanese"),
    [
        ([0.5, 0.95], {"up": 50, "down": 50}, "with 200 B, 1/20 of the traffic of base", "通信量は base の 1/20 です"),
        ([0.5, 0.95], {"up": 570, "down": 570}, "with 2.28 kB, 43\u00a0% less than base", "base より 43\u00a0% 少なく"),
        ([0.5, 0.95], {"up": 1100, "down": 1100}, "10\u00a0% more than base", "base より 10\u00a0% 多く"),
        ([0.5, 0.95], {"up": 5000, "down": 5000}, "5 times as much as base", "base の 5 倍"),
        ([0.5, 0.95], {"up": 1000, "down": 1000}, "as much as base", "base と同じ"),
        (
            [0.5, 0.8],
            {"up": 50, "down": 50},
            "did not reach 90.0\u00a0% accuracy",
            "正解率 90.0\u00a0% に到達しませんでした",
        ),
        ([0.5, 0.95], {"per_client": [0.796, 0.9]}, "loses 0.4 points", "0.4 ポイント悪く"),
        ([0.5, 0.95], {"per_client": [0.85, 0.9]}, "gains 5.0 points", "5.0 ポイント良く"),
        ([0.5, 0.95], {"per_client": [0.8, 0.7, 0.99]}, "loses 10.0 points", "10.0 ポイント悪く"),
        ([0.5, 0.95], {"per_client": [0.8, 0.9]}, "worst tenth of sites fares as well", "変わりません"),
    ],
)
def test_a_sentence_says_traffic_and_the_worst_tenth(tmp_path, values, more, english, japanese):
    base, row = rows_of(tmp_path, BASE, (values, {"name": "other"} | more))
    told = sentence(row, base, True)
    assert english in told.en.replace("2.28\u00a0kB", "2.28 kB").replace("200\u00a0B", "200 B") and japanese in told.ja
    assert told.en.endswith(".") and told.ja.endswith("。") and "。。" not in told.ja


@pytest.mark.parametrize(
    ("ours", "english", "japanese"),
    [
        (8.0, "in 0.8 of the simulated time", "0.8 倍で済み"),
        (25.0, "in 2.5 times the simulated time", "2.5 倍かかり"),
        (0.5, "in 1/20 of the simulated time", "1/20 です"),
        (10.0, "in the same simulated time", "同じです"),
        (None, "", ""),
    ],
)
def test_a_sentence_says_the_simulated_time(tmp_path, ours, english, japanese):
    base, row = rows_of(tmp_path, BASE, (*BASE[:1], {"name": "other"}))
    told = sentence(row | {"simulated_to_target": ours}, base | {"simulated_to_target": 10.0}, True)
    assert english in told.en and japanese in told.ja and ("simulated" in told.en) == (ours is not None)


def test_what_a_tenth_of_sites_loses_turns_with_the_goal_and_minds_the_seeds(tmp_path):
    metric = {"name": "mae", "goal": "min"}
    runs = [
        ([9.0, 2.0], {"name": name, "per_client": [worst], "metric": metric}) for name, worst in (("a", 4.0), ("b", 5.0))
    ]
    base, row = rows_of(tmp_path, *runs, target=3.0)
    assert "loses 1 of mae" in sentence(row, base, False).en
    noisy = row | {"spread": {"worst_decile": 1.5}}
    assert "loses 1 of mae, no more than seeds differ" in sentence(noisy, base, False).en


LEADS = [
    ([("base", 0.95, 100), ("small", 0.95, 10)], "Of all that reach 90.0\u00a0% accuracy, small says least"),
    ([("base", 0.95, 100), ("large", 0.95, 200)], "The baseline is enough"),
    ([("base", 0.95, 100), ("cheap", 0.8, 1)], "The baseline is enough"),
    ([("base", 0.8, 100), ("dear", 0.95, 1000), ("dearer", 0.95, 2000)], "accuracy, dear says least"),
    ([("base", 0.8, 100), ("other", 0.7, 10)], "No method reached 90.0\u00a0% accuracy"),
]


@pytest.mark.parametrize(("runs", "said"), LEADS)
def test_the_lead_names_who_says_least_of_those_that_arrive(tmp_path, runs, said):
    rows = rows_of(tmp_path, *[([0.1, best], {"name": name, "up": up, "down": up}) for name, best, up in runs])
    assert said in lead(rows, True).en and JAPANESE.search(lead(rows, True).ja)
    assert lead(rows[:1], True) is None, "nothing to compare"


def over_scenarios(tmp_path, cheap):
    """Two data settings; `cheap`: bytes of the second method in each of them."""
    runs = []
    for alpha, up in zip((0.1, 1.0), cheap, strict=True):
        asked = {"data": {"alpha": alpha}}
        for name, sent in (("base", 100), ("small", up)):
            folder = tmp_path / f"{name}-{alpha}"
            label = f"{name}, alpha={alpha}"
            runs.append(read_run(make(folder, [0.1, 0.95], name=label, up=sent, down=sent, experiment=asked)))
    return runs


@pytest.mark.parametrize(
    ("cheap", "said"),
    [
        ((10, 20), "small says least in all 2 data settings: 5 to 10 times fewer bytes"),
        ((200, 200), "in no data setting does a method reach the target with less traffic than base"),
        ((10, 200), "depends on the data: small where alpha=0.1; base where alpha=1.0"),
    ],
)
def test_the_lead_over_several_scenarios(tmp_path, cheap, said):
    runs = over_scenarios(tmp_path, cheap)
    rows = summary(runs, 0.9)
    assert [row["short"] for row in rows] == ["base", "small"] * 2 and said in lead(rows, True).en
    page = render(runs, 0.9)
    assert said in page and "small reached" in page, "names without the scenario, which stands above them"


def test_the_page_escapes_names_in_both_languages(tmp_path):
    runs = [read_run(make(tmp_path / "a", [0.5, 0.9], name=EVIL, metric={"name": EVIL, "goal": "max"}, per_client=[0.1]))]
    runs += [read_run(make(tmp_path / "b", [0.5, 0.9], name=f"b{EVIL}", metric={"name": EVIL, "goal": "max"}))]
    page = render(runs)
    assert "<script>window" not in page and "<img" not in page
    assert page.count('<span lang="en">') == page.count('<span lang="ja">') > 50
    for figure in outcome_figures(methods(runs), {"": 0.5}):
        if figure.plot is not None:
            told = json.dumps(json.loads(figure.plot.to_json()), ensure_ascii=False)
            assert "<script" not in told, figure.key
            assert "<img" not in told and (figure.key == "clients" or JAPANESE.search(told))


def test_the_page_works_in_english_without_javascript_and_names_are_not_translated(tmp_path):
    runs = [read_run(make(tmp_path / name, [0.5, 0.9], name=name, up=up)) for name, up in (("update", 100), ("model", 50))]
    page = render(runs)
    assert '<html lang="en">' in page and 'html:not([lang="ja"]) span[lang="ja"]' in page
    assert '<nav id="languages" hidden>' in page, "buttons come with the script that they need"
    figure = frontier_figures(methods(runs))[0].plot
    named = {trace.name: (trace.meta or {}).get("ja", {}).get("name") for trace in figure.data}
    assert named == {"Pareto frontier": "パレートフロンティア", "update": None, "model": None}
