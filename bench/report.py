"""A real report in a real browser: small comparisons, then the page in both languages, narrow and wide, light and dark.

Digits on 20 unlike devices with two data settings: FedAvg, 4 bits up and 8 down, FDA with the same, hybrid precision with 3
bits up. Counted: errors of the console and of scripts, figures that are not drawn, bytes of the file, how far a page sticks
out of its window. --shots FOLDER keeps the pictures and the PDF; --page FILE looks at a report that is there.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import taciturn
from bench.browser import find, started
from bench.common import finish, parser
from taciturn import precision, sync
from taciturn.codecs import error_feedback, quantize, quantize4, quantize8
from taciturn.compare import compare, parse_vary
from taciturn.core.broadcast import Broadcast
from taciturn.experiment import config
from taciturn.report import read_run
from taciturn.report.page import render
from taciturn.report.words import LANGUAGES

WIDTHS = (400, 1300)  # CSS pixels: a telephone, a desk
TOP, SETTING = 1630, "alpha=0.3"  # of the picture of README: pixels, data
# Figures with a drawing and without, and those with legend entries one over the other or outside the figure.
DRAWN = "[...document.querySelectorAll('div.plot')].filter((n) => n.querySelector('.cartesianlayer .trace')).length"
MISSING = (
    "[...document.querySelectorAll('div.plot')].filter((n) => !n.querySelector('.cartesianlayer .trace')).map((n) => n.id)"
)
OVERLAPS = """[...document.querySelectorAll("div.plot")].filter((node) => {
  const boxes = [...node.querySelectorAll(".legend .traces, .legend .legendtext")].filter((n) => n.tagName === "text")
    .map((n) => n.getBoundingClientRect());
  const plot = node.querySelector(".plot-container").getBoundingClientRect();
  return boxes.some((a, i) => a.right > plot.right + 1 || a.bottom > plot.bottom + 1
    || boxes.some((b, k) => i < k && a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2));
}).map((node) => node.id)"""


def build(folder: Path, rounds: int, seeds: int) -> Path:
    """Run the methods in both data settings -> the page."""
    base = taciturn.recipe("quickstart").replace(rounds=rounds, fleet="mixed", name="digits")
    lean = base.method.replace(codec=quantize4(), broadcast=Broadcast(quantize8("block")))
    three = error_feedback(quantize(bits=3, rounding="nearest", scale="channel"))
    hybrid = lean.replace(codec=three, precision=precision.coarse(modes=("ptq3", "qat3")))
    methods = {
        "FedAvg": base.method,
        "4 bits": lean,
        "4 bits with FDA": lean.replace(sync=sync.fda()),
        "3 bits with hybrid precision": hybrid,
    }
    tables = {name: config.to_table(base.replace(method=method))["method"] for name, method in methods.items()}
    found = compare(config.to_table(base), [parse_vary("data.alpha=0.3,3.0")], out=folder, seeds=seeds, methods=tables)
    if found.missing:
        raise RuntimeError(f"runs without a result: {found.missing}")
    one = [read_run(place) for place in found.folders if SETTING in str(place)]  # for the picture, without its name
    page = render([replace(run, name=run.name.removesuffix(f", {SETTING}")) for run in one])
    (folder / "one.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def look(page: Path, shots: Path | None) -> dict[str, Any]:
    """Open the page in every language, width and light -> what is wrong, by look."""
    program, seen = find(), {}
    if program is None:
        return {"console_errors": None, "figures": None, "why": "no chromium or google-chrome on the path"}
    with started(program) as browser:
        for language, width in itertools.product(LANGUAGES, WIDTHS):
            browser.look(width)
            browser.open(f"{page.resolve().as_uri()}#{language}")
            for dark in (False, True):
                browser.look(width, dark)
                name = f"{language}-{width}-{'dark' if dark else 'light'}"
                seen[name] = {
                    "figures": browser.value(DRAWN),
                    "not_drawn": browser.value(MISSING),
                    "overlaps": browser.value(OVERLAPS),
                    "sticks_out": browser.value("document.documentElement.scrollWidth") - width,
                    "language": int(browser.value("document.documentElement.lang") != language),
                }
                if shots is not None:
                    browser.shots(shots / name)
            if shots is not None and width == max(WIDTHS):
                browser.pdf(shots / f"{language}.pdf")
        errors = browser.errors
    wrong = {name: {key: value for key, value in row.items() if value and key != "figures"} for name, row in seen.items()}
    return {
        "console_errors": len(errors),
        "figures": min(row["figures"] for row in seen.values()),
        "errors": errors,
        "wrong": {name: row for name, row in wrong.items() if row},
    }


def picture(page: Path, file: Path) -> None:
    """The top of a report, for README."""
    program = find()
    if program is not None:
        with started(program) as browser:
            browser.look(WIDTHS[-1])
            browser.open(f"{page.resolve().as_uri()}#en")
            browser.shots(file.with_suffix(""), height=TOP)


def main() -> None:
    """Build, look, print the JSON line."""
    options = parser(__doc__)
    options.add_argument("--shots", type=Path, help="folder for pictures and the PDF")
    options.add_argument("--page", type=Path, help="a report to look at, instead of building one")
    options.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    asked = options.parse_args()
    if asked.shots is not None:
        asked.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        rounds, seeds = (10, 1) if asked.quick else (15, 2)
        page = asked.page or build(asked.keep or Path(place), rounds, seeds)
        if asked.shots is not None and asked.page is None:
            picture(page.with_name("one.html"), asked.shots / "readme.png")
        figures = look(page, asked.shots) | {"bytes": page.stat().st_size, "languages": list(LANGUAGES)}
    finish("report", figures, asked.quick or asked.page is not None)


if __name__ == "__main__":
    main()
