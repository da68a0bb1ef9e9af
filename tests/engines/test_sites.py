"""What can go wrong between a server and its sites: lost, late, doubled and broken letters, and servers that went back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import taciturn
from conftest import Net, make_federation, make_task
from drive import drive
from engines.fake_line import FakeLine, line_of, site_of, sites_of
from taciturn import Experiment, Method, Task, codecs, methods, participation, precision, solvers, sync
from taciturn.core import random
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import AllClientsFailed, ConfigError, DataError, RunError, WireError
from taciturn.core.state import stack
from taciturn.core.types import BAD_UPDATE, LOST
from taciturn.engines.letters import Letter, order_of, order_text, read
from taciturn.engines.site import answer, fitted
from taciturn.engines.sites import Sites
from taciturn.experiment.allocation import facts_of
from taciturn.experiment.deployed import readmit
from taciturn.experiment.record import RunFolder
from taciturn.experiment.runner import prepare, restore
from taciturn.round import fed_round
from taciturn.sync import thresholds
from taciturn.wire.format import Frame, Schema, pack, pack_schema

SGD = solvers.sgd(lr=0.1)
HALF = {"participation": participation.uniform(count=4), "batch_size": 8}
CHANGE = Broadcast(codecs.quantize8(), of="change")
FEDAVG = Method(solver=SGD, codec=codecs.error_feedback(codecs.top_k(share=0.3)), broadcast=CHANGE, **HALF)
FEDAPM = methods.fedapm(u=SGD, rho=0.2, **HALF)
FDA = Method(solver=SGD, sync=sync.fda(max_blocks=3), broadcast=CHANGE, **HALF)


def flown(tmp_path, method, spoil, rounds=5, seconds=60.0):
    """The rounds with a line that spoils letters -> what `drive` gives, and the sites."""
    task = make_task()
    line = line_of(task, method, tmp_path)
    line.spoil = spoil
    sites = sites_of(line, method, seconds)
    return *drive(task, method, "flower", rounds=rounds, sites=lambda *_: sites), sites


def collects(letter: Letter) -> bool:
    return letter.order.get("command") == "collect"


LOSSES = [(FEDAPM, "down"), (FEDAPM, "up"), (FEDAVG, "up"), (FEDAVG, "down")]
LOSSES = [pytest.param(*case, marks=pytest.mark.slow if number else ()) for number, case in enumerate(LOSSES)]


@pytest.mark.parametrize(("method", "way"), LOSSES)
def test_what_is_lost_leaves_client_and_server_as_they_were(tmp_path, method, way):
    """As loopback with the same uploads lost: no dual, memory or error counts twice, and lost schemas are sent again."""
    lost = {(r, i) for r in range(5) for i in range(8) if (3 * r + i) % 5 == 0}
    open_round = {}

    def spoil(direction, letter):
        if collects(letter):
            open_round[letter.client] = letter.order["round"]
        gone = direction == way and (open_round.get(letter.client), letter.client) in lost
        return [] if gone and (direction == "up" or collects(letter)) else [letter]

    server, _, stats, _, _ = flown(tmp_path, method, spoil)
    wired = drive(make_task(), method, "loopback", rounds=5, lose=lambda r, i: (r, i) in lost)
    assert torch.equal(server.x, wired[0].x)
    assert any(stat.left_out for stat in stats) and [s.left_out for s in stats] == [s.left_out for s in wired[2]]


def test_a_second_answer_and_a_second_letter_change_nothing(tmp_path):
    first: dict[int, Letter] = {}

    def spoil(direction, letter):
        if direction == "down":
            return [letter, letter]  # the site refuses the second
        late = [first[letter.client]] if letter.client in first else []  # an answer to an older letter first
        first[letter.client] = letter
        former = replace(letter, order=letter.order | {"session": letter.order["session"] - 1})  # of a server before this
        others = [replace(letter, client=i) for i in (-1, 8, 99)]  # never asked
        return [*late, former, *others, letter, letter]

    server, _, stats, traffic, _ = flown(tmp_path, FEDAPM, spoil)
    wired = drive(make_task(), FEDAPM, "loopback", rounds=5)
    assert torch.equal(server.x, wired[0].x) and not any(stat.left_out for stat in stats)
    assert traffic == wired[3]


def _flipped(letter: Letter) -> Letter:
    data = bytearray(letter.frames[-1])
    data[len(data) // 2] ^= 4
    return Letter(letter.client, letter.order, (*letter.frames[:-1], bytes(data)))


def _poisoned(letter: Letter) -> Letter:
    schemas = {}

    (frame,) = read(letter.frames, schemas, 1 << 28)
    payload = {name: torch.full_like(t, float("nan")) if name == "values" else t for name, t in frame.payload.items()}
    data = pack(Frame(frame.kind, payload, frame.round, frame.client, frame.generation))
    return Letter(letter.client, letter.order, (*letter.frames[:-1], data))


def _other_schema(letter: Letter) -> Letter:

    payload = {"values": torch.zeros(3)}
    frame = Frame("update", payload, 0, letter.client)
    return Letter(letter.client, letter.order, (pack_schema(Schema.of(payload)), pack(frame)))


BROKEN = {
    "flipped": (_flipped, LOST, "cannot be read: the checksum"),
    "empty": (lambda letter: Letter(letter.client, letter.order), LOST, "0 messages instead of one"),
    "noise": (lambda letter: Letter(letter.client, letter.order, (b"tc", b"\x80" * 99)), LOST, "cannot be read"),
    "edition": (lambda letter: Letter(letter.client, letter.order | {"edition": 1}), LOST, "edition 1; this server has"),
    "schema": (_other_schema, LOST, "another schema than"),
    "error": (lambda letter: letter.reply(error="no memory"), LOST, "no memory"),
    "poisoned": (_poisoned, BAD_UPDATE, ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_costs_one_client_one_round(tmp_path, name):
    breaks, status, why = BROKEN[name]
    method = Method(solver=SGD, participation=participation.all(), batch_size=8)

    def spoil(direction, letter):
        bad = direction == "up" and letter.client == 2 and letter.frames and _round_of(letter) == 0
        return [breaks(letter)] if bad else [letter]

    server, _, stats, _, sites = flown(tmp_path, method, spoil, rounds=1)
    assert stats[0].status.tolist() == [0, 0, status, 0, 0, 0, 0, 0]
    assert why in sites.silent.get(2, "")
    assert torch.isfinite(server.x).all()
    _, _, again, _, _ = flown(tmp_path / "b", method, spoil, rounds=2)
    assert not again[1].left_out, "the next round has it back"


def _round_of(letter: Letter) -> int:
    """The round of an update; -1 for other messages."""
    data = letter.frames[-1]
    return int.from_bytes(data[8:12], "little") if len(data) > 12 and data[3] == 3 else -1


REFUSED = {
    "edition": ({"edition": 1}, "the server has edition 1"),
    "experiment": ({"fingerprint": "another"}, "the same TOML"),
    "done": ({}, "is no news"),
    "older": ({"number": 0}, "is no news"),
    "former server": ({"session": 5, "number": 1 << 40}, "is no news"),
    "command": ({"command": "erase", "number": 1 << 40}, "there is no command 'erase'"),
    "no command": ({"command": None, "number": 1 << 40}, "there is no command None"),
    "run": ({"run": "../run", "number": 1 << 40}, "named by letters and digits"),
    "round": ({"round": 7, "number": 1 << 40}, "not for client 2 in round 7"),
    "no number": ({"number": "many"}, "ValueError"),
    "client": (99, "client 99 is not at this site"),
    "stranger": (-1, "client -1 is not at this site"),
    "flipped": (_flipped, "the checksum"),
    "cut": (lambda letter: replace(letter, frames=(letter.frames[0][:-1],)), ""),
    "noise": (lambda letter: replace(letter, frames=(b"", b"\x80" * 99)), ""),
    "no model": (lambda letter: replace(letter, frames=()), "begins with no model"),
}


def test_a_site_refuses_what_is_not_for_it_and_keeps_what_it_had(tmp_path):
    method = Method(solver=SGD, participation=participation.all(), batch_size=8)
    *_, sites = flown(tmp_path, method, lambda way, letter: [letter], rounds=2)
    line = sites._line
    *_, last = (letter for way, letter in line.log if way == "down" and letter.client == 2 and collects(letter))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("generation-*")}
    for place, (name, (how, why)) in enumerate(REFUSED.items()):
        bad, next_session = last, {"session": last.order["session"] + 1, "number": place}
        if isinstance(how, int):
            bad = replace(last, client=how)
        elif isinstance(how, dict):
            bad = replace(last, order=last.order | how)
        else:
            bad = how(replace(last, order=last.order | next_session))
        reply = answer(line.site, bad)
        assert why in reply.order["error"] and not reply.frames, (name, reply.order)
        assert {path: path.read_bytes() for path in tmp_path.rglob("generation-*")} == kept, name


def test_who_is_silent_in_a_look_does_not_cost_the_others_the_round(tmp_path, monkeypatch):
    """The line waits for who does not answer, to the end of the time that it is given."""
    clock = [0.0]
    monkeypatch.setattr("taciturn.engines.sites.time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 1.0))
    method = FDA.replace(sync=sync.fda(theta=thresholds.fixed(1e9), max_blocks=3), participation=participation.all())
    task = make_task()
    line = line_of(task, method, tmp_path)
    exchange, waits = line.exchange, []

    def slow(letters, seconds):
        waits.append(seconds)
        silent = [letter for letter in letters if letter.client in (3, 4) and letter.order["number"] > letter.client]
        answers = exchange([letter for letter in letters if letter not in silent], seconds)
        yield from answers if seconds >= 1.0 else ()
        clock[0] += seconds if silent else min(seconds, 1.0)

    monkeypatch.setattr(line, "exchange", slow)
    sites = sites_of(line, method, seconds=60.0)
    _, _, (stats, *_), _ = drive(task, method, "flower", rounds=1, sites=lambda *_: sites)
    assert stats.left_out == {3: "no answer", 4: "no answer"}, sites.silent
    assert clock[0] <= 1 + 60 and waits[0] == 60 and waits[-1] > 1


def test_a_client_lost_in_mid_round_does_not_stop_the_looks(tmp_path):
    method = FDA.replace(sync=sync.fda(theta=thresholds.fixed(1e9), max_blocks=3), participation=participation.all())

    def spoil(direction, letter):
        looks = direction == "down" and letter.order["command"] == "observe"
        return [] if looks and letter.client == 4 and not letter.order.get("begins") else [letter]

    server, _, stats, _, _ = flown(tmp_path, method, spoil, rounds=2)
    assert torch.isfinite(server.x).all()
    assert all(stat.left_out == {4: "no answer"} for stat in stats)


def test_nobody_answers(tmp_path):
    def silent(direction, letter):
        return [letter] if letter.order.get("command") == "hello" or direction == "up" else []

    for name, method, message in (
        ("a", FEDAVG, "none of the 4 clients returned .* Are the sites up"),
        ("b", FDA, "no client answered"),
    ):
        with pytest.raises(AllClientsFailed, match=message):
            flown(tmp_path / name, method, silent)


def test_a_site_with_other_data_is_refused(tmp_path):
    other = make_task(sizes=(1, 7, 16, 33, 5, 20, 11, 3))
    line = line_of(other, FEDAVG, tmp_path)
    with pytest.raises(DataError, match="client 7 has 3 training samples, and this experiment gives it 2"):
        drive(make_task(), FEDAVG, "flower", sites=lambda work, rule: Sites(line, work, rule, "run1", "exp"))


def test_a_site_with_another_experiment_says_so(tmp_path):
    line = line_of(make_task(), FEDAVG, tmp_path)
    sites = Sites(line, line.site.work, FEDAVG.sync, "run1", "another")
    with pytest.raises(RunError, match=r"none of the 8 clients can be reached: .* the same version and the same TOML"):
        drive(make_task(), FEDAVG, "flower", sites=lambda *_: sites)


def test_orders_are_objects():
    assert order_of(order_text({"a": [1, "b"]})) == {"a": [1, "b"]}
    for text in ("", "[1]", "{", "[" * 100_000):
        with pytest.raises(WireError, match="not an order"):
            order_of(text)


# ------------------------------------------------------------------------------------------------- servers that go back


def _experiment(method, rounds, **fields):
    task = Task(Net, make_federation(), loss=torch.nn.CrossEntropyLoss())
    return Experiment(task, method, rounds=rounds, engine="flower", **fields)


class Killed(Exception):
    """A crash of the server."""


BACK = [(FEDAVG, 1), (FEDAVG, 2), (FEDAPM, 1), (FEDAPM, 2), (FDA, 1), (FDA, 2)]
BACK = [pytest.param(*case, marks=pytest.mark.slow if number else ()) for number, case in enumerate(BACK)]


@pytest.mark.parametrize(("method", "every"), BACK)
def test_a_server_that_went_back_ends_in_the_same_bits(tmp_path, monkeypatch, method, every):
    """It dies after round 5 was done and before its checkpoint; the clients have moved on, and go back with it."""
    line = line_of(make_task(), method, tmp_path / "site")

    def sites(work, rule):
        return sites_of(line, method)

    experiment, save = _experiment(method, 7, checkpoint_every=every), RunFolder.save

    def dies(folder, round, *rest):
        if round >= 5:
            raise Killed
        save(folder, round, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", dies)
        with pytest.raises(Killed):
            taciturn.run(experiment, out=tmp_path / "run", sites=sites)
    resumed = taciturn.run(experiment, out=tmp_path / "run", resume=True, sites=sites)
    whole = taciturn.run(experiment.replace(engine="loopback"))
    assert all(torch.equal(resumed.tensors[name], t) for name, t in whole.tensors.items())
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    generations = sorted(path.name for path in (tmp_path / "site" / "run1" / "client-000003").glob("generation-*"))
    assert len(generations) <= 4, f"old ones are deleted: {generations}"


ANEW = [FEDAVG, pytest.param(methods.fedalt(u=SGD, v=SGD, **HALF), marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", ANEW)
def test_a_client_whose_site_lost_its_disk_begins_anew(tmp_path, method):
    """It is left out until it is readmitted, and then it is a newcomer: as if the simulated one were made one by hand."""
    method, out = method.replace(participation=participation.all()), tmp_path / "run"
    line = line_of(make_task(), method, tmp_path / "site")
    told: list = []

    def go(rounds):
        told.append(sites_of(line, method))
        taciturn.run(_experiment(method, rounds), out=out, resume=rounds > 1, sites=lambda *_: told[-1])

    go(1)
    shutil.rmtree(tmp_path / "site" / "run1" / "client-000003")
    go(2)
    assert "client 3 kept is gone" in told[-1].silent[3] and "generation-000001" in told[-1].silent[3]
    with pytest.raises(DataError, match="there is no client 'x'"):
        readmit(_experiment(method, 2), out, "x")
    assert readmit(_experiment(method, 2), out, "site-3") == 2
    go(4)
    assert not told[-1].silent

    state = prepare(_experiment(method, 4).replace(engine="loopback"), lose=lambda r, i: (r, i) == (1, 3))
    engine, ids, three = state.engine, torch.arange(8), torch.tensor([3])
    for r in range(4):
        if r == 2:
            fresh = state.work.newcomer(), state.work.memory()[1], {"version": torch.tensor(-1), "met": torch.tensor(0)}
            for table, record in zip((engine.store, engine._receivers, engine.post._known), fresh, strict=True):
                table.write(three, stack([record]))
        key = random.fold(state.key, "round", r)
        sizes = state.task.train.sizes
        state.server, _ = fed_round(state.server, ids, sizes, method, engine, state.work.split, key)
    found = prepare(_experiment(method, 4), sites=lambda work, rule: told[-1])
    with RunFolder(out) as folder:
        restore(found, folder)
    assert torch.equal(found.server.x, state.server.x)


@pytest.mark.parametrize("method", [FEDAPM, methods.scaffold(**HALF)])
def test_a_client_in_a_mean_of_the_server_cannot_begin_anew(tmp_path, method):
    line = line_of(make_task(), method, tmp_path / "site")
    taciturn.run(_experiment(method, 1), out=tmp_path / "run", sites=lambda *_: sites_of(line, method))
    with pytest.raises(ConfigError, match="has a part that only its site knew"):
        readmit(_experiment(method, 1), tmp_path / "run", "site-3")


def test_personal_models_stay_at_their_sites(tmp_path):
    line = line_of(make_task(), FEDAPM, tmp_path / "site")
    result = taciturn.run(_experiment(FEDAPM, 2), sites=lambda *_: sites_of(line, FEDAPM))
    with pytest.raises(RunError, match="stays at its site"):
        result.client("site-1")


def test_a_policy_that_learns_is_that_of_loopback(tmp_path):
    """Clients measure at their sites, and tell their labels once, in bytes."""
    method = FEDAVG.replace(precision=precision.coarse_fine(settle=1), codec=codecs.quantize4())
    task = make_task()
    site = replace(site_of(task, method, tmp_path / "site"), facts=facts_of(method, task))
    line = FakeLine(site, len(task.train.sizes))
    told: list = []
    flown = taciturn.run(_experiment(method, 3), sites=lambda *_: told.append(sites_of(line, method)) or told[-1])
    wired = taciturn.run(_experiment(method, 3).replace(engine="loopback"))
    assert all(torch.equal(flown.tensors[name], t) for name, t in wired.tensors.items()), told[0].silent
    assert [line["precision"] for line in flown.history] == [line["precision"] for line in wired.history]
    assert [line["traffic"] for line in flown.history] == [line["traffic"] for line in wired.history]


def test_flower_needs_sites():
    with pytest.raises(ConfigError, match="taciturn deploy"):
        taciturn.run(_experiment(FEDAVG, 1))


def test_a_record_of_another_shape_is_refused(tmp_path):

    pattern = {"v": torch.zeros(2), "solver": {}, "tx": {"h": torch.zeros(3)}}
    good = {"v": torch.ones(2), "tx": {"h": torch.ones(3)}}
    assert fitted(pattern, good, "f")["solver"] == {}
    for bad in ({"v": torch.ones(3), "tx": good["tx"]}, {"v": torch.ones(2)}, good | {"w": torch.ones(1)}):
        with pytest.raises(RunError, match="f: "):
            fitted(pattern, bad, "f")
    assert site_of(make_task(), FEDAVG, tmp_path).fingerprint
