"""The standing line-up: every method keeps what is the user's, fits the task or says why, and gets as many trials."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import taciturn
from taciturn import Method, codecs, models, participation, partition, server, solvers, sync
from taciturn.cli import app
from taciturn.compare import LINEUP, chosen, grid
from taciturn.compare.lineup import EPOCHS, SERVER_LR, plain
from taciturn.compare.session import _values, compare
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import MethodError, UnknownName
from taciturn.experiment import config

BASE = Method(
    participation=participation.uniform(count=3), solver=solvers.sgd(lr=0.07), batch_size=9, sync=sync.every(epochs=3)
)
SMALL = taciturn.recipe("quickstart").replace(rounds=1, method=BASE)
SMALL = SMALL.replace(task=replace(SMALL.task, data=replace(SMALL.task.data, clients=4, limit=200)))
LOUD = BASE.replace(codec=codecs.quantize4(), server=server.adam(), broadcast=Broadcast(codecs.quantize8("block")))


@pytest.mark.parametrize("name", LINEUP)
def test_every_method_keeps_what_is_the_users_and_nothing_else(name):
    found = LINEUP[name](LOUD)
    assert found.participation == BASE.participation and found.batch_size == BASE.batch_size
    solver = getattr(found.solver, "u", found.solver)
    assert solver == (replace(BASE.solver, clip=1 / BASE.solver.lr) if name == "lean" else BASE.solver)
    assert found == LINEUP[name](BASE), "codec, server and way down of the user are not part of the line-up's methods"
    assert LINEUP[name].__doc__.endswith(".")


def test_what_each_method_is():
    made = {name: change(BASE) for name, change in LINEUP.items()}
    assert plain(LOUD) == BASE
    assert made["fedavg"] == BASE.replace(sync=sync.every(epochs=1)) and made["fda"] == BASE.replace(sync=sync.fda())
    assert made["fedadam"] == BASE.replace(server=server.adam(lr=0.01))
    assert made["quantize4"].broadcast.start == "known" and made["quantize4"].codec.codec.bits == 4
    assert made["lean"] == Method.lean(BASE)
    assert made["lora"].partition == partition.lora(rank=4, alpha=8.0, also="head")
    own = BASE.replace(partition=partition.lora(rank=1))
    assert LINEUP["lora"](own).partition == LINEUP["lean"](own).partition == own.partition


def test_each_gets_three_trials_of_its_own_setting():
    tables, tuned, unfit = chosen(SMALL, ["all"])
    assert list(tables) == list(LINEUP) and not unfit
    assert tuned["fedavg"] == EPOCHS and tuned["fedadam"] == SERVER_LR and tuned["lean"] == "method.solver.lr"
    cells = grid(config.to_table(SMALL), [], tables)
    assert [cell.base for cell in cells] == list(LINEUP)
    assert {len(_values(cell, tuned[cell.base])) for cell in cells} == {3}
    _, tuned, _ = chosen(SMALL.replace(method=BASE.replace(solver=solvers.lbfgs())), ["fedadam", "lean"])
    assert tuned == {"fedadam": SERVER_LR, "lean": None}


def test_what_does_not_fit_is_said():
    plain_head = SMALL.replace(task=replace(SMALL.task, model=models.linear()))
    tables, _, unfit = chosen(plain_head, ["all"])
    assert set(unfit) == {"lora", "fedapm"} and set(tables) == set(LINEUP) - set(unfit)
    with pytest.raises(MethodError, match="--methods fedapm: "):
        chosen(plain_head, ["fedavg", "fedapm"])
    with pytest.raises(UnknownName, match="did you mean 'fedadam'"):
        chosen(SMALL, ["fedadm"])


def test_the_command_and_its_rows(tmp_path):
    listing = CliRunner().invoke(app, ["ls"]).stdout
    assert all(name in listing for name in LINEUP) and "--methods" in listing
    arguments = ["compare", "quickstart", "--methods", "fedavg,lean", "--seeds", "1", "--rounds", "1", "--json"]
    small = ["--set", "data.clients=4", "--set", "data.limit=200", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, *small])
    assert result.exit_code == 0, result.output
    avg, lean = json.loads(result.stdout)["rows"]
    assert (avg["method"], lean["method"]) == ("fedavg", "lean") and avg["tuned"] in EPOCHS.values
    assert lean["tuned"] in (0.0667, 0.2, 0.6) and lean["bytes"] < avg["bytes"] / 10
    assert len(list(tmp_path.glob("tuning/*/*/result.json"))) == 6


def test_a_setting_for_each_method_counts_with_varied_methods_too(tmp_path):
    tables, tuned, _ = chosen(SMALL, ["fedadam"])
    sizes = taciturn.compare.parse_vary("method.batch_size=8,16")
    rows = compare(config.to_table(SMALL), [sizes], out=tmp_path, seeds=1, methods=tables, tune=tuned).rows
    assert [row["method"] for row in rows] == ["fedadam, batch_size=8", "fedadam, batch_size=16"]
    assert all(row["tuned"] in SERVER_LR.values for row in rows)
