"""Laws of the stream of batches, and of a step that may stand still.

Symbols: n samples of a client; m clients of a block; b samples of a batch; t steps from 0; e epochs.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_task
from taciturn import client, codecs, partition, solvers
from taciturn.core import random
from taciturn.core.state import clone, equal, leaves

quick = settings(max_examples=60, deadline=None)
sizes_ = st.lists(st.integers(1, 25), min_size=1, max_size=4)
batch_ = st.integers(1, 12)


def keys_of(m: int, seed: int = 0) -> torch.Tensor:
    return random.fold(random.key(seed), torch.arange(m))


def batches(sizes, first, steps, batch, widest=None, keys=None):
    size, start = (torch.as_tensor(t).expand(len(sizes)).clone() for t in (sizes, first))
    return random.batches(keys_of(len(sizes)) if keys is None else keys, size, start, steps, batch, widest or max(sizes))


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@quick
@given(sizes_, batch_, st.integers(0, 5))
def test_every_epoch_is_a_permutation(sizes, batch, epoch):
    """ceil(n / b) batches hold each sample once: all full but the last, real samples first."""
    for i, n in enumerate(sizes):
        per_epoch = -(-n // batch)
        index, mask = batches(sizes, epoch * per_epoch, per_epoch, batch)
        assert sorted(index[i][mask[i]].tolist()) == list(range(n))
        counts = mask[i].sum(1).tolist()
        assert counts == [batch] * (per_epoch - 1) + [n - batch * (per_epoch - 1)]
        assert (mask[i].int().diff(dim=1) <= 0).all()


@quick
@given(sizes_, batch_, st.integers(0, 60), st.integers(1, 15))
def test_padding_repeats_a_real_sample(sizes, batch, first, steps):
    index, mask = batches(sizes, first, steps, batch, widest=40)
    assert index.shape == mask.shape == (len(sizes), steps, batch)
    assert index.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask[:, :, 0].all(), "no batch is empty"
    for i, n in enumerate(sizes):
        assert int(index[i].min()) >= 0 and int(index[i].max()) < n


@quick
@given(sizes_, batch_, st.integers(0, 60), st.integers(1, 10), st.integers(1, 30))
def test_the_widest_client_does_not_matter(sizes, batch, first, steps, more):
    assert same(batches(sizes, first, steps, batch), batches(sizes, first, steps, batch, widest=max(sizes) + more))


@quick
@given(sizes_, batch_, st.integers(0, 60), st.integers(1, 10), st.integers(1, 10))
def test_how_steps_are_cut_into_calls_does_not_matter(sizes, batch, first, a, b):
    whole = batches(sizes, first, a + b, batch)
    parts = batches(sizes, first, a, batch), batches(sizes, first + a, b, batch)
    assert same(whole, [torch.cat(pair, 1) for pair in zip(*parts, strict=True)])


@quick
@given(sizes_, batch_, st.data(), st.integers(1, 10))
def test_the_other_clients_of_a_block_do_not_matter(sizes, batch, data, steps):
    first = [data.draw(st.integers(0, 60)) for _ in sizes]
    index, mask = batches(sizes, first, steps, batch)
    for i, n in enumerate(sizes):
        alone = batches([n], [first[i]], steps, batch, keys=keys_of(len(sizes))[i : i + 1])
        assert same(alone, (index[i : i + 1], mask[i : i + 1]))


def test_ten_steps_are_two_times_five():
    sizes = [3, 20, 7]
    left, right = batches(sizes, 0, 5, 4), batches(sizes, 5, 5, 4)
    assert same(batches(sizes, 0, 10, 4), [torch.cat(pair, 1) for pair in zip(left, right, strict=True)])


def test_epochs_and_clients_have_orders_of_their_own():
    n, epochs = 20, 50
    index, mask = batches([n, n], 0, epochs, n)
    assert mask.all()
    assert len(torch.unique(index.flatten(0, 1), dim=0)) == 2 * epochs
    other, _ = batches([n, n], 0, epochs, n, keys=keys_of(2, seed=1))
    assert len(torch.unique(torch.cat([index, other]).flatten(0, 1), dim=0)) == 4 * epochs
    place = torch.bincount(index[:, :, 0].flatten(), minlength=n)
    assert (place - 5.0).abs().max() < 4.5 * (100 / n) ** 0.5, "any sample may come first"


# --------------------------------------------------------------------------------------------------- a step or none

SOLVERS = {
    "momentum": solvers.sgd(momentum=0.9, weight_decay=0.1),
    "adamw": solvers.adamw(weight_decay=0.1),
    "prox": solvers.prox(mu=1.0),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_client_that_is_done_does_not_move_at_all(name):
    """Momentum, decay and the proximal term would move it even without a gradient."""
    task = make_task()
    split = partition.layers(personal="head").split(task.model, task.tracked)
    work = client.Work(task, split, SOLVERS[name], codecs.identity())
    index, mask = batches([16], 0, 2, 8)
    data = [task.train.fetch(torch.tensor([2]), index[:, t]) | {"mask": mask[:, t]} for t in range(2)]
    first, second = ({field: tensor[0] for field, tensor in batch.items()} for batch in data)
    one = torch.ones(())

    def step(active, local, batch):
        return client.step_if(torch.tensor(active), work, {"x": split.x0}, local, batch, random.key(0), one)

    local = step(True, client.begin(work, split.x0, work.newcomer()), first)
    kept = clone(local)
    assert equal(step(False, local, second), kept) and equal(local, kept)
    moved = step(True, local, second)
    still = [a for a, b in zip(leaves(moved), leaves(kept), strict=True) if torch.equal(a, b) and a.numel()]
    constant = 2 if name == "prox" else 1  # start, and the x of prox
    assert len(still) == constant and int(moved["done"]) == 2
    assert not torch.equal(client.drift(work, moved), client.drift(work, kept))
