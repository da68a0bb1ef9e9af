"""A finished run is exported from its result, from its folder and on the command line, and measured beside float32."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import taciturn
from conftest import make_federation
from taciturn import Experiment, Method, Task, TaskSpec, partition, solvers
from taciturn.cli import app
from taciturn.core.errors import ConfigError, DataError, ModelError, RunError, UnknownName
from taciturn.experiment import deployment
from taciturn.experiment.deployment import FORMATS
from taciturn.precision import graph, packed

METHOD = Method(solver=solvers.sgd(lr=0.1), batch_size=8)
onnx_only = pytest.mark.skipif(not graph.available(), reason="export to ONNX needs pip install 'taciturn[export]'")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def finished(task=None, **parts):
    return taciturn.run(Experiment(task or Task(net, make_federation()), METHOD.replace(**parts), rounds=1))


@pytest.fixture(scope="module")
def result():
    return finished()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "digits"
    spec = TaskSpec(taciturn.data.digits(clients=4), taciturn.models.mlp(hidden=(32, 32)))
    taciturn.run(Experiment(spec, METHOD, rounds=1), out=place)
    return place


def test_a_result_writes_its_quantized_model(result, tmp_path):
    found = packed.load(result.export(tmp_path / "model", bits=4), net())
    assert torch.equal(found[2].weight, result.quantized(4)[2].weight) and torch.equal(found[0].bias, result.model[0].bias)


@onnx_only
def test_an_onnx_file_gives_the_logits_of_the_quantized_result(result, tmp_path):
    x = torch.randn(9, 6)
    call = graph.session(result.export(tmp_path / "model.onnx", "onnx-int8", bits=3))
    torch.testing.assert_close(call(x), result.quantized(3)(x).detach(), rtol=0, atol=1e-4)


def test_metrics_are_those_of_the_run(result):
    rows = {row.format: row for row in result.measure(bits=2, formats=["int8"], patience=0.01)}
    assert rows["float32"].metrics == pytest.approx(result.metrics, abs=1e-6)
    two = deployment.metrics(result._task, result.quantized(2))
    assert two["loss"] == pytest.approx(rows["int8"].metrics["loss"], abs=0.002)
    assert abs(two["loss"] - result.metrics["loss"]) > 0.004, "two bits make a difference"
    assert all(row.one > 0 and row.many > 0 and row.bytes > 0 for row in rows.values())
    assert rows["int8"].bytes < rows["float32"].bytes


def test_a_personal_model_is_measured_on_its_clients_data(tmp_path):
    result = finished(partition=partition.layers(personal="4"))
    path = result.export(tmp_path / "mine", client="site-3")
    found = packed.load(path, net())
    assert torch.equal(found[4].weight, result.client("site-3")[4].weight)
    assert not torch.equal(found[4].weight, result.model[4].weight)
    row = result.measure(client="site-3", formats=["int8"], patience=0.01)[0]
    i = result._task.train.names.index("site-3")
    spread = result.history[-1]["spread"]
    assert row.metrics["loss"] == pytest.approx(spread["loss"][spread["ids"].index(i)], rel=1e-4)


def test_a_forward_of_ones_own_is_followed(tmp_path):
    def forward(model, batch):
        return model(batch["input"].flip(1)) * 2

    result = finished(Task(net, make_federation(), forward=forward))
    rows = result.measure(formats=["int8"], patience=0.01)
    assert rows[0].metrics == pytest.approx(result.metrics, abs=1e-6)
    seen = {name: t[:2] for name, t in deployment._example(result._task, 5).items()}
    assert torch.equal(deployment.arguments(result._task, result.model, seen)[0], seen["input"].flip(1))
    twice = Task(net, make_federation(), forward=lambda model, batch: model(batch["input"]) + model(batch["input"]))
    with pytest.raises(ModelError, match="it called it 2 times"):
        finished(twice).export(tmp_path / "m")


def test_what_cannot_be_exported_is_said(result, tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'onnx-int8'"):
        result.export(tmp_path / "m", "onnx_int8")
    with pytest.raises(ConfigError, match=r"export\.bits: 2 to 8; got 1"):
        result.export(tmp_path / "m", bits=1)
    with pytest.raises(RunError, match="cannot write"):
        result.export(tmp_path / "no" / "m")
    with pytest.raises(DataError, match="no client"):
        result.export(tmp_path / "m", client="nobody")


def test_a_folder_with_its_experiment_has_its_model(folder, tmp_path):
    bare = taciturn.load(folder)
    with pytest.raises(RunError, match=r"load\(folder, experiment\)|experiment\)"):
        bare.export(tmp_path / "m")
    spec = TaskSpec(taciturn.data.digits(clients=4), taciturn.models.mlp(hidden=(32, 32)))
    again = taciturn.load(folder, Experiment(spec, METHOD))
    assert deployment.metrics(again._task, again.model)["accuracy"] == pytest.approx(bare.metrics["accuracy"])
    other = TaskSpec(taciturn.data.digits(clients=4), taciturn.models.mlp(hidden=(8, 32)))
    with pytest.raises(RunError, match=r"1\.bias, 1\.weight, 3\.weight differ"):
        taciturn.load(folder, Experiment(other, METHOD))


def test_on_the_command_line(folder, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    done = CliRunner().invoke(app, ["export", str(folder), "--format", "int8", "--out", str(file), "--measure", "--json"])
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["bytes"] == file.stat().st_size and [row["format"] for row in line["measured"]] == ["float32", "int8"]
    assert line["measured"][0]["metrics"] == pytest.approx(taciturn.load(folder).metrics)
    quiet = CliRunner().invoke(app, ["export", str(folder), "--format", "int8", "--bits", "4"])
    assert quiet.exit_code == 0 and " kB" in quiet.stdout and (folder / "model-int8-4.safetensors").exists()
    row = deployment.Exported("int8", 5_000, {"accuracy": 0.5}, 0.002, 0.03, 32)
    monkeypatch.setattr(taciturn.Result, "measure", lambda *arguments: [row])
    table = CliRunner().invoke(app, ["export", str(folder), "--measure"])
    shown = " ".join(table.stdout.split())
    assert shown == "format bytes accuracy ms a sample ms for 32 int8 5 kB 0.5000 2.000 30.000"


def test_a_clients_model_on_the_command_line_and_wrong_input(tmp_path):
    spec = TaskSpec(taciturn.data.digits(clients=4), taciturn.models.mlp(hidden=(32, 32)))
    method = METHOD.replace(partition=partition.layers(personal="head"))
    result = taciturn.run(Experiment(spec, method, rounds=2), out=tmp_path / "run")
    name, file = result._task.train.names[1], tmp_path / "mine"
    before = (tmp_path / "run" / "record.jsonl").read_bytes()
    arguments = ["export", str(tmp_path / "run"), "--format", "int8", "--client", name, "--out", str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert torch.equal(packed.load(file, result.model)[5].weight, result.client(name)[5].weight)
    assert (tmp_path / "run" / "record.jsonl").read_bytes() == before, "nothing was trained"
    for wrong, error in (
        (["--format", "int9"], UnknownName),
        ([], ConfigError),
        (["--format", "int8", "--bits", "1"], ConfigError),
    ):
        assert isinstance(CliRunner().invoke(app, ["export", str(tmp_path / "run"), *wrong]).exception, error)
    assert isinstance(CliRunner().invoke(app, ["export", str(tmp_path), "--format", "int8"]).exception, RunError)


@onnx_only
@pytest.mark.slow
def test_every_format_is_measured(folder):
    spec = TaskSpec(taciturn.data.digits(clients=4), taciturn.models.mlp(hidden=(32, 32)))
    rows = taciturn.load(folder, Experiment(spec, METHOD)).measure(patience=0.05)
    assert [row.format for row in rows] == ["float32", *FORMATS]
    assert max(abs(row.metrics["loss"] - rows[0].metrics["loss"]) for row in rows) < 0.02
