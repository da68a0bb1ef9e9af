"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taciturn.cli import app, main
from taciturn.fleet import machine

runner = CliRunner()
SMALL = ("--set", "data.clients=4", "--set", "method.participation=all", "--set", "data.split=iid")


def call(*arguments):
    return runner.invoke(app, arguments, catch_exceptions=True)


def fails(monkeypatch, capsys, *arguments):
    """Exit code and message of the real entry point."""
    monkeypatch.setattr(sys, "argv", ["taciturn", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


def test_ls_and_show():
    listing = call("ls").stdout
    assert "quickstart" in listing and "[method.FIELD]" in listing and "identity" in listing
    table = tomllib.loads(call("show", "quickstart", "--set", "rounds=3").stdout)
    assert table["rounds"] == 3 and table["method"]["solver"]["name"] == "sgd"


def test_run_json_report_resume(tmp_path):
    out = call("run", "quickstart", "--rounds", "2", "--json", "--out", str(tmp_path / "a"), *SMALL)
    assert out.exit_code == 0, out.output
    line = json.loads(out.stdout.strip().splitlines()[-1])
    assert {"accuracy", "bytes_up", "bytes_down", "rounds", "seconds"} <= line.keys()
    assert line["rounds"] == 2 and 0 < line["accuracy"] <= 1 and line["bytes_up"] > 0
    more = call("run", "--resume", str(tmp_path / "a"), "--rounds", "3", "--json")
    assert json.loads(more.stdout.strip().splitlines()[-1])["rounds"] == 3
    page = tmp_path / "page.html"
    assert call("report", str(tmp_path / "a"), "-o", str(page)).exit_code == 0 and page.stat().st_size > 100_000


def test_toml_file_and_engines_agree(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(call("show", "quickstart", *SMALL).stdout)
    lines = {}
    for engine in ("sequential", "loopback", "stacked"):
        out = call("run", str(file), "--engine", engine, "--rounds", "1", "--json", "--out", str(tmp_path / engine))
        lines[engine] = json.loads(out.stdout.strip().splitlines()[-1])
    keys = ("bytes_up", "bytes_down", "bytes_evaluate", "rounds")
    assert len({tuple(line[k] for k in keys) for line in lines.values()}) == 1
    assert lines["sequential"]["loss"] == lines["loopback"]["loss"]


def test_plain_lines_without_a_terminal(tmp_path):
    out = call("run", "quickstart", "--rounds", "2", "--out", str(tmp_path / "a"), *SMALL)
    assert "round 2/2 loss" in out.output and "accuracy" in out.output


def test_dry_run_says_what_the_first_round_costs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = json.loads(call("run", "quickstart", "--dry-run", "--json", "--rounds", "1", *SMALL).stdout)
    run = json.loads(call("run", "quickstart", "--json", "--rounds", "1", *SMALL).stdout.strip().splitlines()[-1])
    assert facts["bytes_up"] + facts["bytes_down"] + facts["bytes_once"] == run["bytes_up"] + run["bytes_down"]
    assert facts["bytes_all_rounds"] == run["bytes_up"] + run["bytes_down"]
    assert facts["d"] == 64 * 64 + 64 + 640 + 10 and [p.name for p in Path("runs").iterdir()] == ["quickstart-0"]


def test_profile_measures_and_a_run_takes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "SIZES", (16, 32))
    file = tmp_path / "mine.toml"
    told = call("profile", "--out", str(file), "--name", "here", "--up", "8", "--latency", "20", "--patience", "0.01")
    assert told.exit_code == 0 and "float32" in told.stdout and "copy" in told.stdout, told.output
    (found,) = tomllib.loads(file.read_text())["fleet"]["profiles"]
    assert (found["name"], found["up"], found["latency"]) == ("here", 1e6, 0.02)
    assert found["float32"] > 0 and found["bandwidth"] > 0 and 0 < found["launch"] < 1e-2
    setting = ("--set", f"fleet={file}", *SMALL)
    out = call("run", "quickstart", "--rounds", "1", "--json", "--out", str(tmp_path / "run"), *setting)
    assert json.loads(out.stdout.strip().splitlines()[-1])["simulated_seconds"] > 0
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["fleet"]["profiles"] == [found]
    code, text = fails(monkeypatch, capsys, "run", "quickstart", "--set", "fleet=fones")
    assert code == 2 and "did you mean 'phones'" in text
    code, text = fails(monkeypatch, capsys, "profile", "--up", "0", "--patience", "0.01")
    assert code == 2 and "up: a finite number above 0" in text


def test_exit_codes(monkeypatch, capsys, tmp_path):
    code, text = fails(monkeypatch, capsys, "run", "quikstart")
    assert code == 2 and "did you mean 'quickstart'" in text
    code, text = fails(monkeypatch, capsys, "run", "quickstart", "--set", "method.solver.lr=fast")
    assert code == 2 and "method.solver.lr: got 'fast'" in text
    code, text = fails(monkeypatch, capsys, "run", "heart")
    assert code == 2 and "--data FOLDER" in text
    code, text = fails(monkeypatch, capsys, "run", "heart", "--data", str(tmp_path / "absent"))
    assert code == 2 and "absent" in text
    code, text = fails(monkeypatch, capsys, "report", str(tmp_path))
    assert code == 3 and "not a run folder" in text
    code, text = fails(monkeypatch, capsys, "run", "--resume", str(tmp_path))
    assert code == 3 and "not a run folder" in text
    wild = ("--set", "method.solver.lr=1e30", "--set", "method.sync.epochs=9", *SMALL)
    code, text = fails(monkeypatch, capsys, "run", "quickstart", "--out", str(tmp_path / "wild"), *wild)
    assert code == 1 and "lower method.solver.lr" in text


def test_ctrl_c_leaves_a_resumable_run(tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "taciturn.cli",
        "run",
        "quickstart",
        "--rounds",
        "100000",
        "--out",
        str(folder),
        *SMALL,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    record = folder / "record.jsonl"
    while not (record.exists() and record.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert f"taciturn run --resume {folder}" in errors.decode()
    done = record.read_bytes().count(b"\n")
    more = call("run", "--resume", str(folder), "--rounds", str(done + 1), "--json")
    assert json.loads(more.stdout.strip().splitlines()[-1])["rounds"] == done + 1


def test_deploy_says_what_it_needs_and_what_is_there(tmp_path, monkeypatch, capsys):
    place = str(tmp_path / "f")
    assert call("deploy", "status", place).stdout.split() == ["rounds", "0"]
    assert "nothing runs" in call("deploy", "down", place).stdout
    monkeypatch.setattr("taciturn.experiment.federation.find_spec", lambda name: None)
    code, message = fails(monkeypatch, capsys, "deploy", "up", place, *SMALL)
    assert code == 2 and "pip install 'taciturn[flower]'" in message
    code, message = fails(monkeypatch, capsys, "deploy", "up", place, *SMALL, "--set", "deadline=3.0")
    assert code == 2 and "simulated seconds do not end a deployed round" in message
