"""`taciturn advise`: names, the command line, the fragment, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
import tomllib

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from advisor.toys import experiment, least_squares
from taciturn import aggregation, codecs, recipe, server
from taciturn.advisor import advise, candidates, parse_bytes, show
from taciturn.advisor.advice import CANDIDATES, parse_codec, tie
from taciturn.advisor.rank import Forecast
from taciturn.cli import app, main
from taciturn.core.errors import ConfigError, TaciturnError, UnknownName
from taciturn.experiment import config
from taciturn.experiment.spelled import split_list
from taciturn.partition import layers

runner = CliRunner()
SMALL = (
    "--set",
    "data.clients=4",
    "--set",
    "method.participation=all",
    "--set",
    "data.split=iid",
    "--set",
    "model=linear",
    "--set",
    "method.batch_size=96",
    "--set",
    "method.sync.epochs=1",
)
FEW = ("--codecs", "identity,quantize4,sparsify 1/4,top_k(share=0.1)", "--pilot", "2")


def test_codecs_by_name():
    assert parse_codec("quantize8") == codecs.quantize8()
    assert parse_codec("rotated(codec=quantize(bits=4), block=64)") == codecs.rotated(codecs.quantize(bits=4), block=64)
    assert parse_codec("difference(codec=quantize2)") == codecs.difference(codecs.quantize2())
    assert parse_codec("rand_k(share=0.5)") == codecs.rand_k(share=0.5)
    assert split_list("a, b(c=1,d=e(f=2)) ,g") == ["a", "b(c=1,d=e(f=2))", "g"]
    assert list(candidates(None)) == list(CANDIDATES)
    assert list(candidates(["qsgd", "sparsify 1/4", "top_k(k=3)"])) == ["qsgd", "sparsify 1/4", "top_k(k=3)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quantise", "did you mean 'quantize"),
        ("quantize(bits=4", "closing bracket"),
        ("quantize(4)", "field=value"),
        ("quantize(bitz=4)", "did you mean 'bits'"),
        ("quantize(bits=four)", "bits"),
    ],
)
def test_wrong_names(text, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_codec(text)


def test_bytes():
    assert [parse_bytes(text) for text in ("10MB", "500 kB", "2gb", "1e6", "7b")] == [1e7, 5e5, 2e9, 1e6, 7.0]
    for text in ("ten", "5 TB", "MB", ""):
        with pytest.raises(ConfigError, match="500kB"):
            parse_bytes(text)


def test_the_command():
    done = runner.invoke(app, ["advise", "quickstart", "--json", *FEW, *SMALL])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {row["name"]: row for row in told["codecs"]}
    assert told["ranked_by"] == "loss" and rows[told["recommended"]]["loss"] == min(
        row["loss"] for row in rows.values() if row["loss"] is not None
    )
    assert rows["top_k(share=0.1)"]["loss"] is None and "biased" in rows["top_k(share=0.1)"]["why"]
    assert (
        rows["quantize4"]["rounds"] > 25 >= rows["identity"]["rounds"] / 2 and rows["sparsify 1/4"]["how"] == "closed form"
    )
    table = config.to_table(recipe("quickstart")) | {}
    table["method"] |= tomllib.loads(told["toml"])["method"]
    config.from_table(table)


def test_refusals(monkeypatch, capsys):
    def fails(*arguments):
        monkeypatch.setattr(sys, "argv", ["taciturn", "advise", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "not both" in fails("quickstart", "--budget", "1MB", "--link", "5")
    assert "did you mean 'quickstart'" in fails("quikstart")
    assert "500kB" in fails("quickstart", "--budget", "much")
    assert "--latency" in fails("quickstart", "--latency", "5")
    assert "did you mean 'sketch'" in fails("quickstart", "--codecs", "sketsh")
    assert "at least one codec" in fails("quickstart", "--codecs", ",")
    assert "--data FOLDER" in fails("heart")
    assert "--link" in fails("quickstart", "--link", "0")


def test_refusals_after_the_pilot():
    task, _ = least_squares()
    with pytest.raises(ConfigError, match="less than a quarter"):
        advise(experiment(task), budget=100.0)
    with pytest.raises(ConfigError, match="name an unbiased codec too"):
        advise(experiment(task), codecs=["top_k"])


def test_nothing_shared_and_unknown_names():
    task, _ = least_squares()
    with pytest.raises(TaciturnError, match="no trainable parameter is shared"):
        advise(experiment(task, partition=layers(personal="*")))
    with pytest.raises(UnknownName):
        advise(experiment(task), codecs=["nothing"])


def test_time_on_a_link_prefers_fewer_rounds_when_latency_binds():
    task, _ = least_squares(d=8)
    chosen = ["identity", "sparsify(p=0.1)", "top_k(share=0.5)"]
    slow = advise(experiment(task, server=server.averaged()), codecs=chosen, mbit=1.0, latency=5.0)
    assert "averages its iterates" in slow.reasons[-1]
    assert slow.by == "seconds" and slow.best.name == "identity" and slow.best.to_target == pytest.approx(40, rel=0.1)
    assert slow.best.seconds > 40 * 5
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show(slow))
    text = console.export_text()
    for said in ("recommended: identity", "not predicted, biased", "to target", "limits:", "[method.codec]"):
        assert said in text


def test_memory_is_offered_where_it_pays():
    task, _ = least_squares(d=24, clients=6, samples=60, shift=3.0)
    advice = advise(experiment(task, batch=60, rounds=200, lr=0.2), codecs=["sparsify(p=0.5)"], pilot_rounds=20)
    said = " ".join(advice.reasons)
    assert "Memory (difference) pays" in said and any(row.memory for row in advice.ranked)
    assert advice.best.memory and 'name = "difference"' in advice.toml
    alike, _ = least_squares(d=24, clients=6, samples=60)
    advice = advise(experiment(alike, batch=4, rounds=200), codecs=["sparsify(p=0.5)"], pilot_rounds=20)
    assert "would do harm" in " ".join(advice.reasons) and not advice.best.memory


def test_ties_are_said_aloud():
    a = Forecast("a", None, 1.0, 1, loss=1.0, paired=torch.tensor([1.0, 1.1, 0.9]))
    near = Forecast("b", None, 1.0, 1, loss=1.005, paired=torch.tensor([1.005, 1.106, 0.906]))
    wide = Forecast("c", None, 1.0, 1, loss=1.2, paired=torch.tensor([1.2, 1.0, 0.8]))
    worse = Forecast("d", None, 1.0, 1, loss=1.2, paired=torch.tensor([1.2, 1.3, 1.1]))
    assert [tie(a, other, "loss") for other in (near, wide, worse)] == [True, True, False]
    task, _ = least_squares()
    advice = advise(experiment(task), codecs=["identity", "chain(codec=identity,then=identity)"])
    assert advice.tied and "a tie, not a ranking" in " ".join(advice.reasons)
    assert show(advice).renderables


def test_a_method_with_a_shared_memory_can_be_advised():
    """The pilot runs without the memory, and the fragment names the aggregator that the recommended codec needs."""
    known = recipe("quickstart")
    memory = codecs.difference(codecs.quantize4(), alpha=0.3, memory="mean")
    method = known.method.replace(codec=memory, aggregator=aggregation.running(alpha=0.3))
    told = advise(known.replace(method=method, rounds=8), codecs=["quantize4", "identity"], pilot_rounds=2)
    table = config.to_table(known.replace(method=method))
    table["method"] |= tomllib.loads(told.toml)["method"]
    assert config.from_table(table).method.aggregator == aggregation.mean()
