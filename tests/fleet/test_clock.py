"""The clock: seconds by hand. Symbols: work [S, 3, M] bytes down, steps, bytes up of S exchanges and M clients."""

from __future__ import annotations

import pytest
import torch

from taciturn.core import random
from taciturn.core.types import BAD_LOSS, LATE, LOST, OK
from taciturn.fleet import Clock, Fleet, Operator, Profile

STEP = (Operator("float32", 10**9, 0),)  # a second at 1 GFLOP/s
FAST = Profile("fast", float32=2.0, launch=0.0, up=10.0, down=20.0, latency=1.0)
SLOW = Profile("slow", float32=1.0, launch=0.0, up=5.0, down=10.0, latency=2.0)
IDS = torch.tensor([2, 1])


def clock(**fields) -> Clock:
    """Clients 0 and 1 are fast, client 2 is slow."""
    found = Clock.of(Fleet((FAST, SLOW)), 3, (STEP, STEP * 2), random.key(0), **fields)
    return Clock(torch.tensor([0, 0, 1]), *(getattr(found, f) for f in FIELDS), found.deadline, found.late)


FIELDS = ("steps", "up", "down", "latency", "availability")
ONE = torch.tensor([[[100, 100], [3, 4], [50, 50]]])  # one exchange of clients 2 and 1
STATUS = torch.tensor([OK, OK])


def test_bytes_over_the_speed_of_the_line_are_seconds():
    phases = clock().phases(IDS, ONE)
    assert phases.tolist() == [[[100 / 10 + 1, 100 / 20 + 0.5], [3.0, 4 * 0.5], [50 / 5 + 1, 50 / 10 + 0.5]]]
    assert clock().arrivals(phases).tolist() == [25.0, 13.0]


def test_a_device_alone_costs_its_price():
    price = FAST.price(STEP)
    alone = float(clock().arrivals(clock().phases(IDS, ONE))[1])
    assert alone == price.seconds(steps=4, up=50, down=100, exchanges=1)


def test_a_step_takes_what_its_way_takes():
    plain, both = clock().phases(IDS, ONE), clock().phases(IDS, ONE, torch.tensor([1, 0]))
    assert both[0, 1].tolist() == [6.0, 2.0] and torch.equal(both[:, [0, 2]], plain[:, [0, 2]])
    assert clock(deadline=25.0).share(IDS, ONE, torch.tensor([1, 0])).tolist() == [0.0, 1.0]
    assert clock().round(IDS, ONE, STATUS, torch.tensor([0, 1]))["compute"] == [3.0, 4.0]


def test_the_round_ends_with_the_slowest_that_answers():
    line = clock().round(IDS, ONE, STATUS)
    assert line == {
        "round": 25.0, "device": [1, 0], "down": [11.0, 5.5], "compute": [3.0, 2.0], "up": [11.0, 5.5], "wait": [0.0, 12.0],
    }  # fmt: skip
    assert clock().round(IDS, ONE, torch.tensor([LOST, OK]))["round"] == 13.0
    assert clock().round(IDS, ONE, torch.tensor([BAD_LOSS, OK]))["round"] == 25.0, "it did answer"


def test_every_look_waits_for_the_slowest_that_is_looked_at():
    work = torch.cat([ONE, torch.tensor([[[0, 20], [0, 2], [0, 10]]]), torch.tensor([[[10, 20], [0, 0], [5, 10]]])])
    phases = clock().phases(IDS, work)
    assert phases[1, :, 0].tolist() == [0.0, 0.0, 0.0], "who has halted has no message to wait for"
    assert clock().arrivals(phases).tolist() == [25.0 + 4.0 + 4.0, 25.0 + 4.0 + 3.0]
    assert clock().round(IDS, work, STATUS)["wait"] == [4.0, 33.0 - 13.0 - 4.0 - 3.0]


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, [1.0, 1.0]),
        ({"deadline": 25.0}, [1.0, 1.0]),
        ({"deadline": 24.9}, [0.0, 1.0]),
        ({"deadline": 10.0}, [0.0, 0.0]),
        ({"deadline": 12.5, "late": "discount"}, [0.5, 12.5 / 13]),
    ],
)
def test_a_deadline_drops_or_discounts(fields, share):
    assert clock(**fields).share(IDS, ONE).tolist() == share


def test_a_round_with_a_late_client_lasts_until_the_deadline():
    assert clock(deadline=20.0).round(IDS, ONE, torch.tensor([LATE, OK]))["round"] == 20.0
    assert clock(deadline=20.0).round(IDS, ONE, torch.tensor([LATE, LATE]))["round"] == 20.0
    assert clock(deadline=30.0).round(IDS, ONE, STATUS)["round"] == 25.0, "none is missing"


def test_who_can_be_reached_is_a_draw_of_the_round():
    rare = Clock.of(Fleet((Profile(availability=0.3),)), 1000, (STEP,), random.key(0))
    found = [rare.reachable(random.key(seed)) for seed in range(3)]
    assert all(230 < int(one.sum()) < 370 for one in found) and not torch.equal(found[0], found[1])
    assert torch.equal(found[0], rare.reachable(random.key(0))) and bool(clock().reachable(random.key(0)).all())
    alone = Clock.of(Fleet((Profile(availability=0.01),)), 2, (STEP,), random.key(0))
    assert all(bool(alone.reachable(random.key(seed)).any()) for seed in range(20)), (
        "the server asks until somebody is there"
    )
