"""A fixed amount of local work.

Symbols: epoch_steps [M] steps of one pass over each client's data; limit [M] steps.
"""

from __future__ import annotations

import pytest
import torch

from taciturn.core.errors import ConfigError
from taciturn.core.types import Change, Observations, Plan, Spent
from taciturn.sync import every

EPOCH_STEPS = torch.tensor([1, 4, 2])
SCHEDULES = {
    "one epoch": (every(), [1, 4, 2], 4),
    "three epochs": (every(epochs=3), [3, 12, 6], 12),
    "steps": (every(steps=5), [5, 5, 5], 5),
    "one step": (every(steps=1), [1, 1, 1], 1),
    "steps before epochs": (every(epochs=2, steps=5), [5, 5, 5], 5),
    "longest": (every(pace="longest"), [4, 4, 4], 4),
    "longest, two epochs": (every(epochs=2, pace="longest"), [8, 8, 8], 8),
    "longest, steps": (every(steps=5, pace="longest"), [5, 5, 5], 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_of_each_client_and_of_the_round(name):
    rule, limit, stride = SCHEDULES[name]
    kept = EPOCH_STEPS.clone()
    got, got_stride = rule.schedule(EPOCH_STEPS, {})
    assert got.tolist() == limit and got.dtype == torch.int64 and int(got_stride.max()) == stride
    assert torch.equal(EPOCH_STEPS, kept)


@pytest.mark.parametrize("rule", [rule for rule, _, _ in SCHEDULES.values()], ids=SCHEDULES)
def test_nobody_looks_and_over_after_one_stride(rule):
    assert rule.observer == "nobody" and rule.init(torch.zeros(3)) == {} and rule.signal({}) == {} and rule.tell({}) == {}
    payload, go = rule.observe(torch.zeros(3), {}, {})
    assert payload == {} and bool(go) and go.shape == () and go.dtype == torch.bool
    limit, stride = rule.schedule(EPOCH_STEPS, {})
    assert torch.equal(limit, stride), "nobody is left with steps to do, and no stride is longer than needed"
    everyone = torch.ones(3, dtype=torch.bool)
    plan = Plan(0, torch.arange(3), EPOCH_STEPS, limit, torch.ones(3))
    assert rule.watch(Observations({}, everyone, everyone, limit, Spent()), plan, {}) == (None, {})
    assert rule.update({}, plan, {}, Spent(), Change(torch.zeros(3))) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: at least 1; got 0"),
        ({"steps": 0}, "steps: at least 1; got 0"),
        ({"steps": -3}, "steps: at least 1; got -3"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        every(**options)
