"""What is personal stays with its client: personal parameters, duals and copies are in no message, and survive a restart.

Symbols: v_i personal parameters, p_i duals, u_i copies of the shared parameters; d shared values.
"""

from __future__ import annotations

import pytest
import torch

from conftest import Net, make_federation, make_task
from drive import agree, drive, resumes
from taciturn import Experiment, Task, codecs, methods, participation, solvers, sync
from taciturn.wire.format import FRAME

SGD = solvers.sgd(lr=0.1)
HALF = {"participation": participation.uniform(count=4), "batch_size": 8}
METHODS = {
    "fedsim": methods.fedsim(u=SGD, **HALF),
    "fedalt": methods.fedalt(u=solvers.adamw(lr=0.01), v=solvers.sgd(lr=0.1, momentum=0.5), v_steps=3, **HALF),
    "fedapm": methods.fedapm(u=SGD, rho=0.2, **HALF),
    "fedapm-auto": methods.fedapm(u=SGD, **HALF),
    "fedapm-own-start": methods.fedapm(u=SGD, codec=codecs.quantize8(), **HALF).replace(
        solver=solvers.admm(v_steps=3, u_start="own", xi=1e-3)
    ),
    "fedapm-quantize4": methods.fedapm(u=SGD, codec=codecs.quantize4("block"), **HALF),
    "fedapm-fda": methods.fedapm(u=SGD, codec=codecs.top_k(share=0.3), **HALF).replace(sync=sync.fda()),
    "fedadmm": methods.fedadmm(SGD, **HALF),
}


@pytest.mark.parametrize("name", METHODS)
def test_engines_agree_with_lost_uploads(name):
    agree(make_task(lambda: Net(dropout=0.2)), METHODS[name], block=3)


@pytest.mark.parametrize("name", ["fedsim", "fedalt", "fedapm", "fedapm-auto", "fedapm-quantize4"])
def test_nothing_of_it_is_in_a_message(name):
    """Four neighbouring values of v_i, p_i, u_i that training changed are looked for in every byte that was sent."""
    sent, task, method = [], make_task(), METHODS[name]
    split, found = method.split(task.model, task.tracked), 0
    for rounds in range(1, 4):
        sent.clear()
        _, engine, _, traffic = drive(task, method, "loopback", rounds=rounds, tap=sent.append)
        own, seen = engine.store.read(torch.arange(8)), b"".join(sent)
        assert split.x0.numpy().tobytes()[:64] in seen, "the tap sees the shared model"
        starts = {"v": split.v0, "p": torch.zeros_like(split.x0), "u": split.x0}
        for name_of, values in {"v": own["v"], **own["solver"]}.items():
            if name_of in starts:
                changed = (values != starts[name_of]).unfold(1, 4, 1).all(2)
                for i, at in changed.nonzero()[::3].tolist():
                    for dtype in (torch.float32, torch.float64):
                        assert values[i, at : at + 4].to(dtype).numpy().tobytes() not in seen, name_of
                    found += 1
        d = split.layout.d
        spent = traffic[-1]["by_kind"]
        riders = {"fedsim": 8, "fedalt": 8, "fedapm": 16}.get(name, 20)  # loss, steps; gap, coupling; rho if it is found
        assert spent["up/stats"]["payload"] == 4 * riders
        if "quantize" not in name:
            assert spent["up/update"]["payload"] == 4 * 4 * d == spent["down/model"]["payload"]
            assert spent["up/update"]["frame"] == 4 * FRAME
    assert found > 100 and ("p" in own["solver"]) is ("apm" in name)


@pytest.mark.parametrize("name", ["fedalt", "fedapm-auto", "fedapm-quantize4"])
def test_a_run_goes_on_in_the_same_bits(name, tmp_path):
    experiment = Experiment(Task(Net, make_federation()), METHODS[name], rounds=2, engine="sequential")
    resumes(experiment, tmp_path / "run", rounds=4)


def test_each_method_trains_the_blocks_that_it_names():
    """One round on random data: x and v move where they should, and only there."""
    task = make_task()
    for name, (x_moves, v_moves) in {"fedsim": (1, 1), "fedalt": (1, 1), "fedapm": (1, 1), "fedadmm": (1, 0)}.items():
        server, engine, stats, _ = drive(task, METHODS[name], rounds=1)
        split, v = METHODS[name].split(task.model, task.tracked), engine.store.read(stats[0].ids)["v"]
        assert torch.equal(server.x, split.x0) is not bool(x_moves)
        assert (v.numel() > 0 and bool((v != split.v0).any(1).all())) is bool(v_moves)


def test_with_v_steps_alone_only_v_moves():
    task, method = make_task(), methods.fedalt(u=SGD, v_steps=10, u_steps=0, **HALF)
    server, engine, stats, _ = drive(task, method, rounds=1)
    split = method.split(task.model, task.tracked)
    assert torch.equal(server.x, split.x0)
    assert bool((engine.store.read(stats[0].ids)["v"] != split.v0).any(1).all())


@pytest.mark.parametrize("engine", ["sequential", "stacked"])
def test_a_client_whose_personal_part_overflows_is_left_out(engine):
    """Its shared part is finite: where blocks arrive summed it must not be in the sum either."""
    federation = make_federation()
    federation.train.fields["input"][: federation.train.sizes[0]] *= 1e20

    def model():
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    task = Task(model, federation).build(0)
    method = methods.fedsim(u=solvers.sgd(lr=1e-3), v=solvers.sgd(lr=1e19), steps=1, batch_size=8)
    server, runner, stats, _ = drive(task, method, engine, rounds=1)
    assert runner._summed is (engine == "stacked")
    assert stats[0].left_out == {0: "loss not finite"}
    assert bool(torch.isfinite(runner.store.read(torch.arange(8))["v"]).all())
    assert float((server.x - method.split(task.model, task.tracked).x0).abs().max()) < 1.0
