"""Every Python block of README and docs runs, every command named there is one, and the site has every page."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer

from taciturn.advisor import STUDIES
from taciturn.cli import app
from taciturn.experiment import config
from taciturn.experiment.recipes import RECIPES
from test_architecture import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = [(page, block) for page in PAGES for block in BLOCK.findall(page.read_text())]
SHELL = re.compile(r"^ *```(?:sh|console|)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in SHELL.findall(page.read_text())
    for line in (text.strip() for text in block.replace("\\\n", " ").splitlines())
    if re.match(r"([A-Z_]+=\S+ )*taciturn ", line)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(BLOCKS)])
def test_python_blocks_run(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec", dont_inherit=True), {"__name__": "docs"})


def test_there_are_blocks():
    assert any(page.name == "README.md" for page, _ in BLOCKS)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(COMMANDS)])
def test_commands_are_ones(page, line):
    """Command, options and their values are read by the real parser; nothing is run. Sources are recipes or TOML files."""
    words = [word for word in shlex.split(line, comments=True) if word != "&"]
    words = words[words.index("taciturn") + 1 :]
    command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        name, *words = words
        assert name in command.commands, f"{page.name}: taciturn has no command {name!r}: {line}"
        command = command.commands[name]
    try:
        given = command.make_context(command.name, words).params
    except click.UsageError as error:
        pytest.fail(f"{page.name}: {line}: {error.format_message()}")
    source = given.get("source")
    assert not source or source in {**RECIPES, **STUDIES} or re.search(r"\.toml$|^[A-Z|.]+$", source), (
        f"{page.name}: {line}"
    )


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_whole_experiments_in_toml_are_read(page):
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        table = tomllib.loads(block)
        if {"data", "model"} <= table.keys():
            config.from_table(table)


def test_the_codec_of_the_page_keeps_the_laws():
    """docs/howto/add-a-codec.md: what a codec's row in tests/codecs/test_codecs.py would ask of it."""
    (block,) = BLOCK.findall((ROOT / "docs/howto/add-a-codec.md").read_text())
    names = {"__name__": "docs"}
    shown = block.partition("from taciturn.core.random import key")[0]  # the class; what follows runs in the test above
    exec(compile(shown, "add-a-codec.md", "exec", dont_inherit=True), names)
    file = ROOT / "tests/codecs/test_codecs.py"
    spec = importlib.util.spec_from_file_location("laws_of_codecs", file)
    laws = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(laws)
    row = laws.Row(names["powers"]())
    laws.ROWS["powers"] = row
    laws.test_finite_in_finite_out(row)
    for layout in (laws.layout_of(1), laws.layout_of(300), laws.MATRICES):
        laws.test_bytes(row, layout)
        laws.test_zeros_stay_zeros(row, layout)
    laws.test_vmap_is_a_loop(row, laws.MATRICES)
    laws.test_encoding_is_pure_and_the_key_decides(row)
    laws.test_shapes_do_not_depend_on_the_values(row)
    laws.test_double_precision_goes_in(row)
    for bad in (float("nan"), float("inf"), -float("inf")):
        laws.test_what_is_not_finite_reaches_the_server(row, bad)
    for sample in ("unlike", "twelve", "zeros"):
        laws.test_unbiased("powers", sample)
    laws.test_error_is_within_omega("powers", "unlike")


def test_make_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= {
            pair for name in targets for pair in ((name, ""), ("", name))
        }, page.name
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http|#|mailto)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_citation_names_this_version_and_five_papers():
    yaml = pytest.importorskip("yaml")
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told["cff-version"] == "1.2.0" and (told["version"], told["license"]) == (project["version"], project["license"])
    assert told.keys() >= {"message", "title", "authors"}
    papers = {paper["identifiers"][0]["value"]: paper for paper in told["references"]}
    assert {name.removeprefix("arXiv:") for name in papers} == {
        "2508.01348", "2505.04535", "2308.01358", "2506.04672", "2505.11982"
    }  # fmt: skip
    for name, paper in papers.items():
        assert paper["url"].endswith(name.removeprefix("arXiv:")) and paper["title"]
        assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


# ------------------------------------------------------------------------------------------------------------ the site


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"(?:: |- )(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert pages - named == set(), "mkdocs.yml: nav lacks these pages"
    brought = named - pages  # from elsewhere in the repository (docs/mkdocs_hooks.py)
    assert all(page == "index.md" or (ROOT / re.sub(r"\.py\.md$", ".py", page)).exists() for page in brought)


def test_every_exported_name_is_in_the_reference():
    told = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.MULTILINE))
    rooms = [
        "",
        *ROOMS,
        "tasks.data",
        "tasks.models",
        "compare",
        "advisor",
        "report",
        "sync.thresholds",
        "solvers.schedules",
    ]
    for room in rooms:
        module = importlib.import_module(f"taciturn.{room}".rstrip("."))
        for name in module.__all__:
            exported = getattr(module, name)
            if inspect.isclass(exported) or inspect.isfunction(exported):
                assert f"{exported.__module__}.{exported.__qualname__}" in told, f"docs/api lacks {room}.{name}"
    for path in told:
        assert pkgutil.resolve_name(path).__doc__, path


def test_pages_are_brought_to_the_site_as_they_are_read_on_github():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "docs/mkdocs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert doctest.testmod(hooks).failed == 0
    page = "Text:\n- one\n  more\n  - two\n| a |\n\nT\n| a | b |\n|---|:-:|\n| 1 | 2 |\n```\n- kept\n| kept |\n```\n"
    assert hooks.normal(page) == (
        "Text:\n\n- one\n    more\n    - two\n        | a |\n\n"
        "T\n\n| a | b |\n|---|:-:|\n| 1 | 2 |\n```\n- kept\n| kept |\n```\n"
    )
