"""Runs: nothing is lost, nothing is counted twice, and a resumed run is the run."""

from __future__ import annotations

import errno
import json
import os
import random as stdlib_random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import taciturn
from conftest import Net, make_federation
from taciturn import Broadcast, Experiment, Method, StopAt, Task, codecs, participation, partition, server, solvers, sync
from taciturn.core.errors import AllClientsFailed, RunError, RunLocked
from taciturn.experiment import record
from taciturn.experiment.record import RunFolder, read_header, read_lines
from taciturn.experiment.runner import _round, prepare

METHOD = Method(
    partition=partition.layers(personal="head"),
    participation=participation.uniform(count=4),
    sync=sync.every(epochs=2),
    solver=solvers.sgd(lr=0.1, momentum=0.5),
    codec=codecs.cast(),
    broadcast=Broadcast(codecs.cast("bfloat16"), "change"),
    server=server.adam(lr=0.05),
    batch_size=8,
)


def experiment(**fields) -> Experiment:
    base = {"task": Task(lambda: Net(dropout=0.2), make_federation()), "method": METHOD, "rounds": 6}
    return Experiment(**base | fields)


def without_clock(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("engine", ["auto", "sequential", "loopback"])
def test_resumed_is_bit_identical(tmp_path, engine):
    whole = taciturn.run(experiment(engine=engine), out=tmp_path / "whole")
    taciturn.run(experiment(engine=engine, rounds=2), out=tmp_path / "cut")
    taciturn.run(experiment(engine=engine, rounds=5), out=tmp_path / "cut", resume=True)
    cut = taciturn.run(experiment(engine=engine), out=tmp_path / "cut", resume=True)
    assert without_clock(whole.history) == without_clock(cut.history)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()
    for name in whole.header["clients"]:
        a, b = (result.client(name).state_dict() for result in (whole, cut))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_folder_changes_nothing(tmp_path):
    inside, outside = taciturn.run(experiment(), out=tmp_path), taciturn.run(experiment())
    assert without_clock(inside.history) == without_clock(outside.history)
    assert all(torch.equal(inside.tensors[name], t) for name, t in outside.tensors.items())


def test_same_seed_same_run_other_seed_other_run():
    one, same, other = (taciturn.run(experiment(seed=seed, rounds=2)) for seed in (1, 1, 2))
    assert without_clock(one.history) == without_clock(same.history) != without_clock(other.history)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_run import experiment
import taciturn
folder = Path({folder!r})
taciturn.run(experiment(rounds=40), out=folder, resume=(folder / "run.json").exists())
"""


@pytest.mark.slow
def test_killed_at_random_points_and_resumed(tmp_path):
    """kill -9 again and again; the run that comes out is the undisturbed one, bit for bit."""
    whole = taciturn.run(experiment(rounds=40), out=tmp_path / "whole")
    folder, chance = tmp_path / "killed", stdlib_random.Random(0)
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    paths = Path(taciturn.__file__).parents[1], Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
        goal = 4 + 8 * attempt if attempt < 4 else 99
        while process.poll() is None and not (folder.exists() and _rounds(folder) >= goal):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        if process.returncode == 0:
            break
    assert kills >= 3 and process.returncode == 0
    assert without_clock(read_lines(folder)) == without_clock(whole.history)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def _rounds(folder: Path) -> int:
    path = folder / "record.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_torn_record_or_a_broken_checkpoint_is_survived(tmp_path):
    whole = taciturn.run(experiment(), out=tmp_path / "whole")
    folder = tmp_path / "cut"
    taciturn.run(experiment(rounds=4), out=folder)
    with open(folder / "record.jsonl", "ab") as file:
        file.write(b'{"round": 5, "loss"')
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    cut = taciturn.run(experiment(), out=folder, resume=True)
    assert without_clock(cut.history) == without_clock(whole.history)


def test_checkpoint_every(tmp_path):
    taciturn.run(experiment(rounds=5, checkpoint_every=2), out=tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-000004.safetensors",
        "checkpoint-000005.safetensors",
    ]


class Poisoned:
    """A client whose samples are not numbers."""

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return torch.full((6,), float("nan")), i % 3


def datasets(poisoned):
    table = make_federation().train
    good = [[(table.fields["input"][r], int(table.fields["target"][r])) for r in rows] for rows in table.rows.split(9)[:5]]
    return {f"good-{i}": part for i, part in enumerate(good)} | {f"bad-{i}": Poisoned() for i in range(poisoned)}


@pytest.mark.parametrize("engine", ["sequential", "stacked"])
def test_clients_that_are_not_finite_are_left_out_and_named(engine):
    method = Method(solver=solvers.sgd(lr=0.1), batch_size=8)
    with_bad = taciturn.run(Experiment(Task(Net, datasets(2)), method, rounds=3, engine=engine, evaluate_on="train"))
    clean = taciturn.run(Experiment(Task(Net, datasets(0)), method, rounds=3, engine=engine, evaluate_on="train"))
    assert with_bad.history[0]["left_out"] == [{"client": f"bad-{i}", "why": "loss not finite"} for i in (0, 1)]
    assert with_bad.summary["left_out"] == 6
    for name, t in clean.tensors.items():
        assert torch.allclose(t, with_bad.tensors[name], atol=1e-6), "they must count nothing"


def test_if_all_fail_the_last_checkpoint_is_kept(tmp_path):
    class Fuse(nn.Module):
        """Works until its weight has moved."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            moved = (self.layer.weight.square().sum() - self.start).abs() > 0.3
            return torch.where(moved, torch.nan, self.layer(x))

    torch.manual_seed(0)
    fuse = Fuse()
    fuse.start = float(fuse.layer.weight.detach().square().sum())
    method = Method(solver=solvers.sgd(lr=0.3), batch_size=8, sync=sync.every(steps=1), server=server.momentum(lr=2.0))
    run = Experiment(Task(fuse, make_federation()), method, rounds=50)
    with pytest.raises(AllClientsFailed, match=r"learning rate.*last good checkpoint is in"):
        taciturn.run(run, out=tmp_path)
    lines = read_lines(tmp_path)
    assert 0 < len(lines) < 50 and list(tmp_path.glob(f"checkpoint-{len(lines):06d}*"))
    assert not (tmp_path / "result.json").exists()


def test_lost_uploads_are_as_if_not_drawn():
    """A client whose upload is lost keeps its old state and does not acknowledge the model."""
    state = prepare(experiment(), lose=lambda round, client: True)
    with pytest.raises(AllClientsFailed, match="no answer"):
        _round(state)
    assert not state.engine.store.written().any() and (state.engine.post.versions(torch.arange(8)) == -1).all()


def test_stop_at(tmp_path):
    by_metric = taciturn.run(experiment(rounds=30, stop_at=StopAt(metric=0.5)))
    assert by_metric.stopped == "metric" and by_metric.metrics["accuracy"] >= 0.5 and len(by_metric.history) < 30
    by_bytes = taciturn.run(experiment(rounds=30, stop_at=StopAt(bytes=5000)))
    assert by_bytes.stopped == "bytes" and by_bytes.bytes_up + by_bytes.bytes_down >= 5000
    assert by_bytes.history[-2]["bytes_up"] + by_bytes.history[-2]["bytes_down"] < 5000
    assert taciturn.run(experiment(rounds=30, stop_at=StopAt(seconds=0.0))).stopped == "seconds"


def test_evaluation_is_counted_apart_and_sees_personal_heads():
    often = taciturn.run(experiment(rounds=3, evaluate_clients_every=1))
    seldom = taciturn.run(experiment(rounds=3, evaluate_every=3))
    assert often.bytes_up == seldom.bytes_up and often.bytes_down == seldom.bytes_down
    assert often.summary["bytes_evaluate"] > 2 * seldom.summary["bytes_evaluate"] > 0
    assert seldom.history[0]["metrics"] is None and seldom.history[2]["spread"]["ids"] == list(range(8))
    counts = seldom.history[2]["spread"]["count"]
    pooled = sum(n * a for n, a in zip(counts, seldom.history[2]["spread"]["accuracy"], strict=True)) / sum(counts)
    assert pooled == pytest.approx(seldom.metrics["accuracy"], abs=1e-6)


def test_central_metric_is_the_models_accuracy():
    result = taciturn.run(experiment(method=METHOD.replace(partition=partition.full())))
    central = make_federation().central
    x, y = (central.fields[name][central.rows] for name in ("input", "target"))
    with torch.no_grad():
        accuracy = float((result.model(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(result.metrics["accuracy"], abs=1e-6)


def test_it_learns():
    result = taciturn.run(experiment(rounds=25, method=METHOD.replace(partition=partition.full())))
    assert result.metrics["accuracy"] > 0.8, result.metrics


def test_result_saves_and_loads(tmp_path):
    result = taciturn.run(experiment(rounds=2))
    loaded = taciturn.load(result.save(tmp_path / "kept"))
    assert loaded.history == result.history and loaded.summary == result.summary
    assert all(torch.equal(result.tensors[name], t) for name, t in loaded.tensors.items())
    with pytest.raises(RunError, match="load its tensors"):
        _ = loaded.model
    with pytest.raises(RunError, match="not a run folder"):
        taciturn.load(tmp_path)


def test_folder_errors(tmp_path):
    folder = tmp_path / "run"
    taciturn.run(experiment(rounds=1), out=folder)
    with pytest.raises(RunError, match="holds a run already"):
        taciturn.run(experiment(rounds=1), out=folder)
    with pytest.raises(RunError, match="another method"):
        taciturn.run(experiment(method=METHOD.replace(batch_size=4)), out=folder, resume=True)
    with RunFolder(folder), pytest.raises(RunLocked, match="another process"):
        taciturn.run(experiment(), out=folder, resume=True)
    with pytest.raises(RunError, match="another model"):
        taciturn.run(experiment(task=Task(Wider, make_federation())), out=folder, resume=True)
    header = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(RunError, match=r"format 99; this version reads format 1"):
        read_header(folder)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="cannot write to the run folder"):
        taciturn.run(experiment(), out=file / "below")


class Wider(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.head(self.stem(x))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    whole = taciturn.run(experiment(), out=tmp_path / "whole")
    real, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if "checkpoint-000004" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        taciturn.run(experiment(), out=tmp_path / "full")
    monkeypatch.setattr(os, "replace", real)
    resumed = taciturn.run(experiment(), out=tmp_path / "full", resume=True)
    assert without_clock(resumed.history) == without_clock(whole.history)


def test_record_write_failure_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(record.os, "fsync", _enospc)
    with pytest.raises(RunError, match="No space left"):
        taciturn.run(experiment(), out=tmp_path)


def _enospc(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_callbacks_see_every_line(tmp_path):
    seen = []
    result = taciturn.run(experiment(rounds=3), callbacks=[seen.append])
    assert seen == result.history

    def stop(line):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        taciturn.run(experiment(), out=tmp_path, callbacks=[stop])
    resumed = taciturn.run(experiment(), out=tmp_path, resume=True)
    assert len(resumed.history) == 6


def test_float64_and_schedules():
    method = METHOD.replace(codec=codecs.identity(), broadcast=Broadcast(codecs.identity()))
    result = taciturn.run(experiment(dtype="float64", method=method, rounds=2))
    assert result.tensors["stem.weight"].dtype == torch.float64
    assert result.history[0]["traffic"]["by_kind"]["up/update"]["payload"] == 8 * result.header["d"] * 4


def test_sampled_clients_come_from_participation():
    result = taciturn.run(experiment(rounds=4, method=replace(METHOD, participation=participation.cyclic(count=4))))
    cohorts = [line["cohort"] for line in result.history]
    assert sorted(cohorts[0] + cohorts[1]) == list(range(8)) == sorted(cohorts[2] + cohorts[3])
