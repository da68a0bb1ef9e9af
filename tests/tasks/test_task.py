"""Tasks: padding changes nothing, dropout is keyed, odd models are refused with their remedy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from conftest import Net, make_federation, make_task
from drive import drive
from taciturn import Metric, Task, participation, partition, solvers
from taciturn.core import random
from taciturn.core.errors import DataError, ModelError
from taciturn.method import Method
from taciturn.tasks.randomness import keyed

METHOD = Method(participation=participation.uniform(count=4), solver=solvers.sgd(lr=0.1), batch_size=8)


def batch_of(task, n=5, pad=0):
    batch = {k: t[0] for k, t in task.train.fetch(torch.tensor([3]), torch.arange(n).unsqueeze(0)).items()}
    padded = {k: torch.cat([t, t[:1].expand(pad, *t.shape[1:])]) for k, t in batch.items()}
    return padded | {"mask": torch.arange(n + pad) < n}


@pytest.mark.parametrize("model", [Net, lambda: Net(dropout=0.5)], ids=["plain", "dropout"])
def test_padding_changes_nothing(model):
    task = make_task(model)
    params = dict(task.model.named_parameters())
    key = random.key(3)
    plain, padded = (task.loss(params, batch_of(task, pad=pad), key) for pad in (0, 7))
    assert torch.allclose(plain, padded, rtol=1e-6)
    sums, padded_sums = (task.measure(params, batch_of(task, pad=pad)) for pad in (0, 7))
    for name in sums:
        assert torch.allclose(sums[name], padded_sums[name], rtol=1e-6), name
    assert float(sums["count"]) == 5


class Functional(nn.Module):
    """Dropout by function, in place, by channel and inside attention."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.stem, self.head = kind, nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True) if kind == "attention" else None

    def forward(self, x):
        x = torch.relu(self.stem(x))
        if self.kind == "functional":
            x = F.dropout(x, 0.5, self.training)
        elif self.kind == "in place":
            x = F.dropout(x * 1, 0.5, self.training, inplace=True)
        elif self.kind == "channels":
            x = F.dropout1d(x.unsqueeze(-1), 0.5, self.training).squeeze(-1)
        elif self.kind == "attention":
            x = self.attention(x.unsqueeze(1).expand(-1, 3, -1), *(x.unsqueeze(1).expand(-1, 3, -1),) * 2)[0].mean(1)
        elif self.kind == "sdpa":
            q = x.unsqueeze(1).expand(-1, 3, -1)
            x = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0).mean(1)
        elif self.kind == "noise":
            x = x + 0.1 * torch.randn_like(x) if self.training else x
        return self.head(x)


@pytest.mark.parametrize("kind", ["functional", "in place", "channels", "attention", "sdpa"])
def test_dropout_of_every_kind_is_keyed(kind):
    task = make_task(lambda: Functional(kind))
    assert task.facts.randomness == "keyed" and not task.sequential_only
    params, batch = dict(task.model.named_parameters()), batch_of(task)
    one, same, other = (float(task.loss(params, batch, random.key(k)).detach()) for k in (1, 1, 2))
    assert one == same != other
    state = torch.get_rng_state()
    task.loss(params, batch, random.key(5))
    assert torch.equal(state, torch.get_rng_state()), "torch's generator must not be touched"


def test_dropout_functions_are_torchs_again_outside():
    before = torch._VF.dropout, F.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="inside"), keyed(random.key(0)):
        assert before[0] is not torch._VF.dropout
        raise RuntimeError("inside")
    assert (torch._VF.dropout, F.scaled_dot_product_attention) == before


def test_keyed_dropout_keeps_the_mean_and_the_rate():
    with keyed(random.key(0)):
        x = F.dropout(torch.ones(100_000), 0.3, True)
    assert abs(float((x == 0).float().mean()) - 0.3) < 4 * (0.3 * 0.7 / 1e5) ** 0.5
    assert torch.allclose(x[x != 0], torch.tensor(1 / 0.7))


def test_keyed_attention_is_attention_when_nothing_is_dropped():
    q, k, v = (random.normal(random.fold(random.key(0), i), 2, 4, 5, 8) for i in range(3))
    for arguments in ({}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, {"scale": 0.3}):
        with keyed(random.key(0)):
            ours = F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **arguments)
        assert torch.allclose(ours, F.scaled_dot_product_attention(q, k, v, **arguments), atol=1e-5), arguments


def test_other_randomness_runs_one_by_one_under_a_seed():
    task = make_task(lambda: Functional("noise"))
    assert task.facts.randomness == "seeded" and "dropout" in task.sequential_only
    torch.manual_seed(1)
    one, *_ = drive(task, METHOD, "auto", rounds=2)
    torch.manual_seed(2)
    two, *_ = drive(task, METHOD, "loopback", rounds=2)
    assert torch.equal(one.x, two.x), "the draws are of the run's seed, not of torch's"


def test_models_that_vmap_cannot_batch_fall_back():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            y = self.layer(x)
            return y if y.sum().item() > -1e9 else -y

    task = make_task(Branches)
    stacked, *_ = drive(task, METHOD, "auto", rounds=1)
    plain, *_ = drive(task, METHOD, "sequential", rounds=1)
    assert torch.equal(stacked.x, plain.x)


def test_batchnorm_is_refused_with_the_remedy():
    task = make_task(lambda: Net(norm=nn.BatchNorm1d(8)))
    with pytest.raises(ModelError, match='personal="norms"'):
        partition.full().split(task.model, task.tracked)
    with pytest.raises(ModelError, match="FedBN"):
        partition.layers(personal="head").split(task.model, task.tracked)
    split = partition.layers(personal="norms").split(task.model, task.tracked)
    assert split.buffers.names == ("norm.running_mean", "norm.running_var")


def test_frozen_norm_stays_frozen():
    """A part that the user put in evaluation mode stays there; a model that is in it as a whole is trained."""
    net = Net(norm=nn.BatchNorm1d(8))
    net.norm.eval()
    task = make_task(lambda: net)
    assert not task.tracked and not task.facts.couples and not task.model.norm.training
    assert make_task(lambda: Net().eval()).model.training


def test_users_model_is_not_touched():
    net = Net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    drive(Task(net, make_federation()).build(0), METHOD, rounds=2)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, target: F.cross_entropy(output, target), "one value a sample"),
        (lambda output, target: output[99], "failed on two samples"),
    ],
)
def test_wrong_losses_are_refused(loss, message):
    with pytest.raises(ModelError, match=message):
        Task(Net, make_federation(), loss).build(0)


def test_losses_of_torch_are_taken_as_they_are():
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)):
        task = Task(Net, make_federation(), loss).build(0)
        mask = batch_of(task)
        assert task.loss(dict(task.model.named_parameters()), mask, random.key(0)).shape == ()


def test_the_users_loss_is_not_touched():
    loss = nn.CrossEntropyLoss()
    task = Task(Net, make_federation(), loss).build(0)
    assert loss.reduction == "mean" and loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)).shape == ()
    assert task.values(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)).shape == (4,)


def test_no_parameter_no_module_no_target():
    with pytest.raises(ModelError, match=r"give an nn\.Module"):
        Task(lambda: 3, make_federation()).build(0)
    with pytest.raises(ModelError, match="nothing can be trained"):
        drive(make_task(lambda: Net().requires_grad_(False)), METHOD)
    with pytest.raises(DataError, match="target"):
        Task(Net, [[{"input": torch.zeros(6)}]]).build(0)


def test_lists_and_dicts_of_datasets():
    x, y = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 19), (19, 30))]
    by_list = Task(Net, parts, hold_out=0.0).build(0)
    by_name = Task(Net, dict(zip("abc", parts, strict=True)), test=parts[0]).build(0)
    assert by_list.train.names == ("client-0", "client-1", "client-2") and by_name.train.names == ("a", "b", "c")
    assert by_name.data.central.sizes.tolist() == [4]
    method = METHOD.replace(participation=participation.all())
    one, *_ = drive(by_list, method, "stacked", rounds=2, block=2)
    two, *_ = drive(by_name, method, "sequential", rounds=2)
    assert torch.allclose(one.x, two.x, rtol=1e-4, atol=1e-6)
    with pytest.raises(DataError, match="'empty'"):
        Task(Net, {"a": parts[0], "empty": TensorDataset(x[:0], y[:0])}).build(0)


def test_without_a_test_set_clients_hold_some_out():
    parts = [[(torch.full((6,), float(10 * c + i)), i % 3) for i in range(10)] for c in range(3)] + [[(torch.zeros(6), 0)]]
    task = Task(Net, parts, validation=0.1).build(0)
    assert task.train.sizes.tolist() == [7, 7, 7, 1] and task.held_out("validation").sizes.tolist() == [1, 1, 1, 0]
    assert task.held_out("test").sizes.tolist() == [2, 2, 2, 0]
    seen = [task.held_out(split).fetch(torch.tensor([1]), torch.arange(n).unsqueeze(0))["input"][0, :, 0].tolist()
            for split, n in (("train", 7), ("validation", 1), ("test", 2))]  # fmt: skip
    assert sorted(value for values in seen for value in values) == [10.0 + i for i in range(10)], "every sample once"


def test_augmenting_datasets_see_the_same_draws_on_every_engine():
    class Noisy:
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return torch.randn(6) + i, i % 3

    method = METHOD.replace(participation=participation.all())
    task = Task(Net, [Noisy(), Noisy(), Noisy()]).build(0)
    one, *_ = drive(task, method, "sequential", rounds=2)
    two, *_ = drive(task, method, "stacked", rounds=2, block=3)
    assert torch.allclose(one.x, two.x, rtol=1e-4, atol=1e-6)


def test_own_metrics_are_pooled_over_samples():
    top2 = Metric("top2", lambda output, target: (output.topk(2).indices == target.unsqueeze(-1)).any(-1).float())
    task = Task(Net, make_federation(), metrics=(top2,)).build(0)
    sums = {name: float(v) for name, v in task.measure(dict(task.model.named_parameters()), batch_of(task)).items()}
    assert set(task.pool(sums)) == {"loss", "top2"} and 0 <= task.pool(sums)["top2"] <= 1


def test_unlike_samples_are_named():
    bad = [(torch.zeros(6), 0), (torch.zeros(5), 1)]
    with pytest.raises((DataError, ModelError), match="client-0"):
        Task(Net, [bad]).build(0)
