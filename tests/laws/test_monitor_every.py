"""Looks that pay: over a line with known seconds of a round trip, looking takes less than a tenth of each round's time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_task
from drive import drive
from engines.fake_line import FakeLine, line_of, sites_of
from taciturn import Method, participation, solvers, sync
from taciturn.core.errors import ConfigError
from taciturn.core.types import Spent
from taciturn.experiment import config
from taciturn.sync import thresholds

LATENCY, STEP = 0.1, 0.02
RULE = sync.fda(monitor_every="auto", theta=thresholds.fixed(1e9), block=1.0)
METHOD = Method(
    sync=RULE, solver=solvers.sgd(lr=0.01), participation=participation.uniform(count=3), batch_size=8
)  # fmt: skip


class Clock:
    """Seconds that pass when somebody says so: a machine under load measures nothing here."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow(FakeLine):
    """A round trip takes `latency`, a local step STEP; trips: command, round, seconds of each exchange."""

    def over(self, clock, latency):
        self.clock, self.latency, self.trips = clock, latency, []
        return self

    def exchange(self, letters, seconds):
        began = self.clock.now
        self.clock.now += self.latency
        answers = list(super().exchange(letters, seconds))
        first = letters[0].order
        self.trips.append((first["command"], first["round"], self.clock.now - began))
        yield from answers


def flown(folder, monkeypatch, method, latency, rounds=3):
    from taciturn.engines import site, sites, train

    clock, plain = Clock(), train.Trainer._advance

    def advance(trainer, opened, part, steps):
        before = int(opened.done.sum())
        plain(trainer, opened, part, steps)
        clock.now += STEP * (int(opened.done.sum()) - before)

    monkeypatch.setattr(train.Trainer, "_advance", advance)
    monkeypatch.setattr(site.time, "perf_counter", clock)
    monkeypatch.setattr(sites.time, "monotonic", clock)
    task = make_task()
    made = line_of(task, method, folder)
    line = Slow(made.site, made.clients).over(clock, latency)
    return line, drive(task, method, "flower", rounds=rounds, sites=lambda *_: sites_of(line, method, seconds=1e9))


def shares(line):
    """Of each round's time, what looks take beside training: a round trip each."""
    rounds = sorted({r for command, r, _ in line.trips if command in ("observe", "collect")})
    mine = [[(c, s) for c, r, s in line.trips if r == one and c in ("observe", "collect")] for one in rounds]
    return [sum(line.latency for c, _ in trips if c == "observe") / sum(s for _, s in trips) for trips in mine]


def test_looks_take_less_than_a_tenth_after_the_first_round(tmp_path, monkeypatch):
    line, (_, _, stats, _) = flown(tmp_path, monkeypatch, METHOD, LATENCY)
    found = shares(line)
    assert found[0] > 0.1 and max(found[1:]) < 0.1, found
    told = stats[-1].sync["clocked"]
    assert told["look_seconds"] == pytest.approx(LATENCY) and told["step_seconds"] > 0
    assert sum(c == "observe" for c, *_ in line.trips) > 3


def test_without_it_looks_take_most_of_the_time(tmp_path, monkeypatch):
    """The law sees what it should."""
    line, _ = flown(tmp_path, monkeypatch, METHOD.replace(sync=replace(RULE, monitor_every=None)), LATENCY)
    assert min(shares(line)) > 0.15


@pytest.mark.parametrize(
    "rule", [replace(RULE, max_blocks=2), sync.fda(monitor_every="auto"), sync.fda(monitor_every="auto", monitor="local")]
)
def test_a_line_without_latency_changes_nothing(tmp_path, monkeypatch, rule):
    method = METHOD.replace(sync=rule)
    _, (server, _, stats, _) = flown(tmp_path, monkeypatch, method, 0.0)
    plain = drive(make_task(), method.replace(sync=replace(rule, monitor_every=None)), "loopback", rounds=3)
    here = drive(make_task(), method, "loopback", rounds=3)
    assert torch.equal(server.x, plain[0].x) and torch.equal(here[0].x, plain[0].x)
    for one, other in zip(stats, plain[2], strict=True):
        assert torch.equal(one.steps, other.steps) and one.exchanges == other.exchanges
        assert {k: v for k, v in one.sync.items() if k != "clocked"} == other.sync


def test_the_next_round_follows_from_the_state():
    """So a resumed run decides as the run would have: what was clocked is in its checkpoint."""
    epoch, x = torch.tensor([10, 20]), torch.zeros(3)
    state = RULE.init(x)
    assert RULE.schedule(epoch, state)[1].tolist() == [10, 20]
    state["clocked"] = torch.tensor([0.01, 2.0], dtype=torch.float64)
    limit, first = RULE.schedule(epoch, state)
    assert first.tolist() == [1150, 2300] and limit.tolist() == [1150, 2300], "11.5 s of steps for a second of a look"
    capped = replace(RULE, max_blocks=3)
    assert capped.schedule(epoch, state | {"rule": capped.init(x)["rule"]})[0].tolist() == [30, 60]
    assert Spent().look_seconds == 0.0


def test_what_a_site_says_of_its_seconds_is_not_believed_beyond_what_passed(tmp_path, monkeypatch):
    from taciturn.engines import letters

    plain = letters.Letter.reply
    for lie in (1e12, -5.0, "soon", True):
        monkeypatch.setattr(
            letters.Letter,
            "reply",
            lambda self, frames=(), lie=lie, **facts: plain(self, frames, **facts | {"seconds": lie}),
        )
        short = METHOD.replace(sync=replace(RULE, max_blocks=2))
        _, (_, engine, *_) = flown(tmp_path / str(lie), monkeypatch, short, LATENCY, rounds=1)
        step, look = engine.crew.observed()
        assert 0 <= step < 10 and 0 <= look < 10, lie


def test_toml_and_errors():
    whole = config.from_table(
        config.to_table(
            config.from_table(
                {"data": "digits", "model": "mlp", "method": {"sync": {"name": "fda", "monitor_every": "auto"}}}
            )
        )
    )
    assert whole.method.sync == sync.fda(monitor_every="auto")
    with pytest.raises(ConfigError, match="monitor_every"):
        sync.fda(monitor_every="often")
