"""The account of bench/faults.py is right of runs with losses and crashes, and it sees a site that errs."""

from __future__ import annotations

import pytest
import torch
from bench.faults import account

import taciturn
from conftest import Net, make_federation, make_task
from engines.fake_line import line_of, sites_of
from taciturn import Experiment, Task, codecs, methods, participation, solvers
from taciturn.core.broadcast import Broadcast
from taciturn.engines.site import _Desk
from taciturn.experiment.record import RunFolder

METHOD = methods.fedapm(
    u=solvers.sgd(lr=0.1),
    codec=codecs.top_k(share=0.3),
    broadcast=Broadcast(codecs.quantize8(), of="change"),
    participation=participation.uniform(count=3),
    batch_size=8,
)


class Killed(Exception):
    """A crash of the server."""


def told(tmp_path, monkeypatch, dies=3):
    """A run of 5 rounds whose uploads are lost now and then, and whose server dies once, before a checkpoint."""
    task = Task(Net, make_federation(), loss=torch.nn.CrossEntropyLoss())
    mine = Experiment(task, METHOD, rounds=5, engine="flower", checkpoint_every=2)
    line = line_of(make_task(), METHOD, tmp_path / "site")

    def spoil(way, letter):
        frame = letter.frames[-1] if letter.frames else b""
        upload = way == "up" and frame[3:4] == b"\x03"
        lost = upload and (3 * int.from_bytes(frame[8:12], "little") + letter.client) % 5 == 0
        return [] if lost else [letter]

    line.spoil = spoil
    save = RunFolder.save

    def crash(folder, round, *rest):
        if round > dies:
            raise Killed
        save(folder, round, *rest)

    def sites(work, rule):
        return sites_of(line, METHOD)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "save", crash)
        taciturn.run(mine, out=tmp_path / "run", sites=sites)
    taciturn.run(mine, out=tmp_path / "run", resume=True, sites=sites)
    return account(mine, tmp_path / "run", [tmp_path / "site"])


def test_nothing_is_lost_and_nothing_counts_twice(tmp_path, monkeypatch):
    figures = told(tmp_path, monkeypatch)
    assert figures["left_out"] > 0 and figures["accepted"] == 15 - figures["left_out"]
    assert (figures["lost_updates"], figures["double_counted"], figures["differs"]) == (0, 0, [])


def newest(desk, number):
    """A site that starts from the newest record that it has, accepted or not."""
    found = [int(path.stem[11:]) for path in desk.folder.glob("generation-*")]
    return ORIGINAL(desk, max(found, default=number))


def first(desk, number):
    """A site that forgets what it kept."""
    return ORIGINAL(desk, 0) | {"copy": ORIGINAL(desk, number)["copy"]}


ORIGINAL = _Desk._generation


@pytest.mark.parametrize(
    ("errs", "counted"), [pytest.param(newest, "double_counted", marks=pytest.mark.slow), (first, "lost_updates")]
)
def test_a_site_that_errs_is_seen(tmp_path, monkeypatch, errs, counted):
    monkeypatch.setattr(_Desk, "_generation", errs)
    figures = told(tmp_path, monkeypatch)
    assert figures[counted] > 0 and not figures["state_equal"], figures
