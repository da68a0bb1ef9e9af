"""What a round costs. Units: seconds, bytes, bytes a second."""

from __future__ import annotations

import pytest

from taciturn.core.errors import ConfigError
from taciturn.fleet import Price


def test_every_term_counts():
    price = Price(step_seconds=2.0, up=10.0, down=100.0, latency=0.5)
    assert price.seconds(steps=3, up=0, down=0, exchanges=0) == 6.0
    assert price.seconds(steps=0, up=20, down=0, exchanges=0) == 2.0
    assert price.seconds(steps=0, up=0, down=200, exchanges=0) == 2.0
    assert price.seconds(steps=0, up=0, down=0, exchanges=3) == 1.5
    assert price.seconds(steps=3, up=20, down=200, exchanges=3) == 11.5


@pytest.mark.parametrize("epochs", [0.5, 5.0, 50.0])
def test_crossing_is_what_it_says(epochs):
    price = Price.crossing(epochs, model_bytes=4000, epoch_steps=8, latency=0.02)
    epoch = price.seconds(steps=8, up=0, down=0, exchanges=0)
    for way in ("up", "down"):
        assert price.seconds(steps=0, exchanges=0, **({"up": 0, "down": 0} | {way: 4000})) == pytest.approx(epochs * epoch)
    assert price.seconds(steps=0, up=0, down=0, exchanges=1) == pytest.approx(0.02 * epochs * epoch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_seconds": 0.0}, "step_seconds: seconds above 0; got 0.0"),
        ({"up": 0.0}, "up and down are bytes a second; got 0.0"),
        ({"down": -1.0}, "bytes a second; got 1250000.0, -1.0"),
        ({"latency": -0.1}, "latency: seconds, at least 0; got -0.1"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        Price(**fields)
