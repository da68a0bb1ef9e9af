"""Event files for TensorBoard: read back, a run's numbers; what is missing is said."""

from __future__ import annotations

import struct
import sys

import pytest
from typer.testing import CliRunner

from report.folders import make
from taciturn.cli import app
from taciturn.core.errors import ConfigError
from taciturn.report import read_run, write_scalars
from taciturn.report.scalars import scalars


def events(folder):
    """{tag: [(step, value, Unix time)]} of a folder's event files. A record: length [8], crc [4], message, crc [4]."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    return found


def test_scalars_are_those_of_the_record(tmp_path):
    sync = [{"drift": [1.0, 3.0]}, None, {"drift": [float("nan"), 4.0]}]
    run = read_run(make(tmp_path / "a", [0.5, None, float("nan")], sync=sync, up=100, down=200))
    found = {}
    for tag, step, value, at in scalars(run):
        found.setdefault(tag, []).append((step, value))
        assert tag.startswith("over_bytes") or at == 1767225600 + 0.5 * step  # begun at the start of 2026; 0.5 s a round
    assert found == {
        "accuracy": [(1, 0.5)],
        "other": [(1, 0.0), (3, 0.0)],
        "loss": [(1, 2.0), (2, 1.0), (3, 2 / 3)],
        "bytes/up": [(1, 100.0), (2, 200.0), (3, 300.0)],
        "bytes/down": [(1, 200.0), (2, 400.0), (3, 600.0)],
        "bytes/both": [(1, 300.0), (2, 600.0), (3, 900.0)],
        "steps": [(1, 6.0), (2, 6.0), (3, 6.0)],
        "drift": [(1, 2.0), (3, 4.0)],
        "over_bytes/accuracy": [(300, 0.5)],
    }


def test_event_files_are_read_back(tmp_path):
    pytest.importorskip("tensorboardX")
    folders = [make(tmp_path / f"{name}-{seed}", [0.5, 0.25 * seed], name=name, seed=seed)
               for name in ("a/b", "a b") for seed in (0, 1)]  # fmt: skip
    stale = tmp_path / "events" / "a-b" / "seed-0"
    stale.mkdir(parents=True)
    for name in ("events.out.tfevents.1.host.taciturn", "events.out.tfevents.1.host"):
        (stale / name).touch()
    written = write_scalars(folders, tmp_path / "events")
    assert sum(1 for _ in stale.iterdir()) == 2 and (stale / "events.out.tfevents.1.host").exists()  # ours is replaced
    assert [str(path.relative_to(tmp_path / "events")) for path in written] == [
        "a-b/seed-0", "a-b/seed-1", "a-b+/seed-0", "a-b+/seed-1"
    ]  # fmt: skip
    for path, folder in zip(written, folders, strict=True):
        told = [(tag, step, pytest.approx(value), at) for tag, step, value, at in scalars(read_run(folder))]
        found = [(tag, *event) for tag, all_ in events(path).items() for event in all_]
        assert sorted(found, key=lambda one: one[:2]) == sorted(told, key=lambda one: one[:2])


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'taciturn\[tensorboard\]'"):
        write_scalars([make(tmp_path / "a", [0.5])], tmp_path / "events")


def test_the_command_writes_them_beside_the_page(tmp_path):
    pytest.importorskip("tensorboardX")
    place, page = tmp_path / "events", tmp_path / "page.html"
    folder = make(tmp_path / "a", [0.5])
    done = CliRunner().invoke(app, ["report", str(folder), "-o", str(page), "--tensorboard", str(place)])
    assert done.exit_code == 0 and page.exists() and events(place / "fedavg" / "seed-0")["accuracy"][0][:2] == (1, 0.5)
