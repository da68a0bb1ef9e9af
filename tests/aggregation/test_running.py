"""The running mean against one memory for each of N clients.

Symbols: N clients; q_i what a client sends; h_i <- h_i + alpha q_i; w_i weights.
"""

from __future__ import annotations

import pytest
import torch

from taciturn import Method, aggregation, codecs
from taciturn.core import random
from taciturn.core.errors import ConfigError, MethodError
from taciturn.core.types import OK, Block
from taciturn.core.vector import Layout

N, D, ALPHA = 7, 5, 0.3
LAYOUT = Layout(("w",), ((D,),))


@pytest.mark.parametrize("update", ["unbiased", "memory"])
@pytest.mark.parametrize("weights", ["clients", "samples"])
def test_equals_a_memory_of_every_client(update, weights):
    sizes = torch.tensor([1, 5, 2, 9, 3, 3, 4])
    rule = aggregation.running(alpha=ALPHA, update=update, weights=weights)
    state, h = rule.init(torch.zeros(D), sizes), torch.zeros(N, D, dtype=torch.float64)
    w = torch.ones(N) if weights == "clients" else sizes.float()
    for r in range(12):
        ids = random.permutation(random.key(r), N)[: 1 + r % N]
        q = random.normal(random.fold(random.key(r), "q"), len(ids), D)
        acc = rule.start(state, torch.zeros(D))
        for rows in torch.arange(len(ids)).split(2):
            many = len(rows)
            acc = rule.add(
                acc, Block(ids[rows], torch.zeros(many, D), q[rows], w[ids[rows]], LAYOUT, {}, torch.full((many,), OK))
            )
        change, state = rule.finish(acc)
        before = (w.double() @ h) / w.double().sum()
        h[ids] += ALPHA * q.double()
        mean = (w.double() @ h) / w.double().sum()
        sent = (w[ids].double() @ q.double()) / w[ids].double().sum()
        expected = before + sent if update == "unbiased" else mean
        torch.testing.assert_close(change.update, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state["mean"], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_alpha(alpha):
    with pytest.raises(ConfigError, match=r"running\.alpha: above 0 and at most 1"):
        aggregation.running(alpha=alpha)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"aggregator": aggregation.running()}, "two halves of one memory"),
        ({"codec": codecs.difference(alpha=0.5, memory="mean")}, "two halves of one memory"),
        (
            {"codec": codecs.difference(alpha=0.5, memory="mean"), "aggregator": aggregation.running(alpha=0.25)},
            r"codec\.alpha = 0\.5 and aggregator\.alpha = 0\.25 must be equal",
        ),
    ],
)
def test_the_halves_belong_together(parts, says):
    with pytest.raises(MethodError, match=says):
        Method(**parts)
