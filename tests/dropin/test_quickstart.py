"""The quickstart app: at most five lines are added by each diff, and it runs, here and in a real federation."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dropin.nodes import MemoryGrid, app, ordered

used = ordered
APP = Path(__file__).parents[2] / "examples" / "flower-quickstart"
DIFFS = sorted(path.stem for path in APP.glob("*.diff"))


def applied(diff: str, folder: Path) -> Path:
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__", "*.diff"))
    environment = os.environ | {"GIT_DIR": os.devnull}
    subprocess.run(["git", "apply", str(APP / f"{diff}.diff")], cwd=folder, env=environment, check=True)
    return folder


def test_there_is_one_for_each():
    assert set(DIFFS) == {"both", "compression", "fda", "ledger"}


@pytest.mark.parametrize("diff", [pytest.param(d, marks=pytest.mark.slow) if d == "fda" else d for d in DIFFS])
def test_at_most_five_lines_are_added_and_it_runs(diff, tmp_path, monkeypatch):
    text = (APP / f"{diff}.diff").read_text().splitlines()
    assert sum(line.startswith("+") and not line.startswith("+++") for line in text) <= 5
    folder = applied(diff, tmp_path / "app")
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        monkeypatch.delitem(sys.modules, name)
    client, server = (importlib.import_module(f"quickstart.{side}_app").app for side in ("client", "server"))
    grid = MemoryGrid(dict.fromkeys((1, 2), client), node_config={"num-partitions": 2})
    server(grid, app.Context(1, 1, {}, app.RecordDict(), {"num-server-rounds": 2, "out": str(tmp_path)}))
    reached = list(json.loads((tmp_path / "accuracy.json").read_text()).values())
    totals = json.loads((tmp_path / "ledger.json").read_text())["totals"]
    assert not grid.errors() and reached[-1] > reached[0] and totals["up/update"]["messages"] == 4
    size = totals["up/update"]["payload"] / 4
    assert (size < 34_000 * 0.6) == (diff in ("compression", "both")), size


@pytest.mark.deploy
def test_it_runs_in_a_real_federation(tmp_path):
    """SuperLink and two SuperNodes as processes, with TLS and node keys; memories in their state-dir."""
    from taciturn.experiment.federation import Federation

    bundle, out = applied("both", tmp_path / "app"), tmp_path / "out"
    out.mkdir()
    settings = (
        (bundle / "pyproject.toml").read_text().replace('out = "."', f'out = "{out}"').replace("rounds = 20", "rounds = 3")
    )
    (bundle / "pyproject.toml").write_text(settings)
    with Federation(tmp_path / "f") as held:
        held.command("run", str(bundle), "taciturn")
        end = time.monotonic() + 400
        while not (out / "accuracy.json").exists() and time.monotonic() < end:
            held.supervise()
            time.sleep(1.0)
        logs = {log.name: log.read_text(errors="replace")[-2000:] for log in (tmp_path / "f" / "logs").iterdir()}
        assert (out / "accuracy.json").exists(), logs
        assert any((tmp_path / "f" / "node-0").glob("flower-held-*")), "what the node holds is in its folder"
    reached = list(json.loads((out / "accuracy.json").read_text()).values())
    totals = json.loads((out / "ledger.json").read_text())["totals"]
    assert len(reached) == 4 and reached[-1] > reached[0] and totals["up/update"]["messages"] == 6
