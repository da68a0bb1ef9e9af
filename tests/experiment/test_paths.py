"""A resumed run keeps to the path it began on."""

from __future__ import annotations

import json
import multiprocessing
import sys

import pytest
import torch
from test_run import experiment

import taciturn
from taciturn.core.errors import RunError
from taciturn.experiment.runner import prepare


def test_another_path_is_refused(tmp_path):
    taciturn.run(experiment(rounds=1), out=tmp_path)
    header = json.loads((tmp_path / "run.json").read_text())
    assert header["engine"]["path"] == "layer by layer" and header["engine"]["block"] > 1
    header["engine"]["path"] = "vmap"
    (tmp_path / "run.json").write_text(json.dumps(header))
    with pytest.raises(RunError, match="began on the path 'vmap'"):
        taciturn.run(experiment(rounds=2), out=tmp_path, resume=True)


def test_the_block_is_read_from_the_record(tmp_path):
    taciturn.run(experiment(rounds=1), out=tmp_path)
    header = json.loads((tmp_path / "run.json").read_text())
    header["engine"]["block"] = 3
    (tmp_path / "run.json").write_text(json.dumps(header))
    header["engine"]["least"] = 4
    engine = prepare(experiment(workers=1), header).engine
    assert engine.block == 3 and engine._size(8) == 2, "four blocks, as the run began"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked: Linux")
def test_a_run_may_go_on_with_other_workers(tmp_path):
    alone = taciturn.run(experiment(rounds=4, workers=2))
    taciturn.run(experiment(rounds=2, workers=2), out=tmp_path)
    resumed = taciturn.run(experiment(rounds=4, workers=3), out=tmp_path, resume=True)
    assert all(torch.equal(alone.tensors[name], value) for name, value in resumed.tensors.items())
    assert [line["traffic"] for line in alone.history] == [line["traffic"] for line in resumed.history]
    assert multiprocessing.active_children() == []
