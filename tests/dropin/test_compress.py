"""Codecs around Flower's strategies: laws, losses, and the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dropin.nodes import COUNTER, app, client, grid_of, moved, numpy_of, ordered, random_model, record_of, same
from taciturn import Broadcast, codecs
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.vector import Layout
from taciturn.flower import Compressed, compress_mod
from taciturn.wire.format import FRAME

strategies = pytest.importorskip("flwr.serverapp.strategy")
used = ordered
SETTINGS = {"min_train_nodes": 3, "min_evaluate_nodes": 3, "min_available_nodes": 3}
NAMES = ["FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", "FedTrimmedAvg"]


def strategy(name: str = "FedAvg", **more):
    return getattr(strategies, name)(**SETTINGS | more)


LOSSLESS = [*((name, codecs.identity()) for name in NAMES), ("FedAvg", codecs.lossless(codecs.identity()))]


@pytest.mark.parametrize(("name", "codec"), LOSSLESS)
def test_what_loses_nothing_changes_no_bit_of_any_strategy(name, codec):
    plain, wrapped = grid_of(), grid_of(compress_mod(codec))
    a = strategy(name).start(plain, random_model(), num_rounds=3)
    b = Compressed(strategy(name), codec).start(wrapped, random_model(), num_rounds=3)
    assert not wrapped.errors() and same(a.arrays, b.arrays)
    assert a.train_metrics_clientapp == b.train_metrics_clientapp
    assert a.evaluate_metrics_clientapp == b.evaluate_metrics_clientapp


def test_fedprox_and_what_it_tells_clients_stay(used):
    grid = grid_of(compress_mod(codecs.identity()))
    Compressed(strategies.FedProx(proximal_mu=0.1, **SETTINGS), codecs.identity()).start(grid, random_model(), num_rounds=1)
    assert grid.sent[0].content["config"]["proximal-mu"] == 0.1 and not grid.errors()


CODECS = {
    "quantize4": codecs.quantize4(),
    "top_k": codecs.top_k(share=0.2),
    "rotated": codecs.rotated(codecs.quantize4()),
    "chain": codecs.chain(codecs.top_k(share=0.2), codecs.quantize8()),
    "feedback": codecs.error_feedback(codecs.top_k(share=0.2)),
    "feedback rotated": codecs.error_feedback(codecs.rotated(codecs.quantize(bits=2))),
    "lowrank": codecs.error_feedback(codecs.lowrank(rank=1)),
    "per tensor": codecs.per_tensor(codecs.error_feedback(codecs.top_k(share=0.2)), codecs.identity(), least=10),
    "ef21": codecs.ef21(codecs.top_k(share=0.2)),
    "diana": codecs.difference(codecs.quantize4()),
    "lossless": codecs.lossless(codecs.quantize4()),
}
LOST = {(2, 1), (3, 1), (5, 3), (6, 2)}  # round, node


def oracle(codec, rounds: int, lost=(), forgets=()) -> dict[str, np.ndarray]:
    """FedAvg with the codec in a naked loop: memories move where a reply arrived, and nowhere else."""
    x = numpy_of(random_model())
    names = sorted(name for name in x if name != COUNTER)
    layout = Layout(tuple(names), tuple(x[name].shape for name in names))
    memory = {node: codec.init(layout) for node in (1, 2, 3)}
    for t in range(1, rounds + 1):
        got = []
        for node in (1, 2, 3):
            if (t, node) in forgets:
                memory[node] = codec.init(layout)
            y, (tx, rx) = moved(node, x), memory[node]
            u = torch.cat([torch.from_numpy(np.asarray(y[n] - x[n])).flatten().float() for n in names])
            key = random.fold(random.key(0), "flower", node - 1, 2 * t - 1)  # an exchange of evaluation between
            payload, tx = codec.encode(u, tx, key, layout=layout, knobs={})
            if (t, node) in lost:
                continue
            v, rx = codec.decode(payload, rx, layout=layout)
            memory[node] = tx, rx
            views = layout.views(v)
            got.append((10 + node, {n: x[n] + views[n].numpy() if n in names else y[n] for n in x}))
        total = sum(weight for weight, _ in got)
        factors = [weight / total for weight, _ in got]
        mean = {n: arrays * factors[0] for n, arrays in got[0][1].items()}
        for factor, (_, arrays) in zip(factors[1:], got[1:], strict=True):
            mean = {n: one + arrays[n] * factor for n, one in mean.items()}
        x = {n: np.asarray(one) for n, one in mean.items()}
    return x


@pytest.mark.parametrize(("name", "place"), [*((n, "context") for n in CODECS), ("feedback", "disk"), ("diana", "disk")])
def test_memories_and_lost_replies_are_those_of_a_naked_loop(name, place, tmp_path):
    codec = CODECS[name]
    where = {"state-dir": str(tmp_path)} if place == "disk" else {}
    grid = grid_of(compress_mod(codec), lost={(2 * t - 1, node) for t, node in LOST}, node_config=where)
    found = Compressed(strategy(fraction_evaluate=0.0), codec).start(grid, random_model(), num_rounds=7)
    assert not grid.errors() and (place == "context") == (not any(tmp_path.iterdir()))
    wanted = oracle(codec, 7, LOST)
    assert all(np.array_equal(one, wanted[key]) for key, one in numpy_of(found.arrays).items())


@pytest.mark.parametrize("name", ["feedback", "diana", "ef21"])
def test_a_node_that_lost_its_memory_begins_anew_on_both_sides(name):
    codec, grid = CODECS[name], grid_of(compress_mod(CODECS[name]))
    grid.spoil = lambda reply: grid.contexts.pop(2, None) if len(grid.sent) == 9 else None  # after node 3 in round 3
    found = Compressed(strategy(fraction_evaluate=0.0), codec).start(grid, random_model(), num_rounds=5)
    wanted = oracle(codec, 5, forgets={(4, 2)})
    assert all(np.array_equal(one, wanted[key]) for key, one in numpy_of(found.arrays).items())


def test_bytes_are_those_of_the_frame_and_of_what_is_not_float32():
    grid, layout = grid_of(compress_mod(codecs.quantize4())), Layout(("a", "b", "c"), ((3, 6), (6,), (6, 5)))
    Compressed(strategy(), codecs.quantize4()).start(grid, random_model(), num_rounds=1)
    payload, _ = codecs.quantize4().encode(torch.zeros(54), {}, random.key(0), layout=layout, knobs={})
    counter = len(app.Array(np.array(3)).data)
    from taciturn.core.payload import nbytes

    assert grid.size(grid.came, "train") == 3 * (FRAME + int(nbytes(payload)) + counter)
    array = grid.came[0].content["arrays"]["taciturn/update"]
    assert array.stype == "taciturn" and array.data[:2] == b"tc"


DOWN = {
    "half": codecs.cast(dtype="float16"),
    "change": codecs.quantize8(),
    "sparse change": Broadcast(codecs.top_k(share=0.3), of="change"),
    "whole": codecs.identity(),
}


UPS = {"identity": codecs.identity(), "feedback": CODECS["feedback"]}
PLACES = [("half", "identity", "context"), ("whole", "identity", "context"), ("change", "identity", "context")]
PLACES += [("sparse change", "feedback", "context"), ("change", "feedback", "disk")]


@pytest.mark.parametrize(("name", "up", "place"), PLACES)
def test_clients_hold_what_the_server_thinks_they_hold(name, up, place, tmp_path):
    """Nodes answer or not, forget, and come back: what each trains from and evaluates is within the codec of x."""
    up = UPS[up]
    where = {"state-dir": str(tmp_path)} if place == "disk" else {}
    grid, seen, models = grid_of(node_config=where, lost={(3, 1), (4, 3), (9, 2)}), {}, []
    for node in grid.clients:
        seen[node] = []
        grid.clients[node] = client(node, [compress_mod(up, DOWN[name])], seen=seen[node])
    inner = strategy()

    def note(round, arrays):
        models.append(numpy_of(arrays))

    wrapped = Compressed(inner, up, DOWN[name])
    found = wrapped.start(grid, random_model(), num_rounds=8, evaluate_fn=note)
    assert not grid.errors() and len(models) == 9
    for node, held in seen.items():
        assert len(held) == 8, node
        for t, x in enumerate(held):
            assert list(x) == list(models[t]) and x["stem.weight"].dtype == np.float32
            assert np.array_equal(x[COUNTER], models[t][COUNTER]), "what is not float32 travels as it is"
            far = max(float(np.abs(x[n] - models[t][n]).max()) for n in x)
            assert far <= {"half": 2e-3, "change": 2e-2, "sparse change": 0.5, "whole": 1e-6}[name], (node, t, far)
    for a, b, c in zip(seen[1], seen[2], seen[3], strict=True):
        assert all(np.array_equal(a[n], b[n]) and np.array_equal(a[n], c[n]) for n in a), "all hold the same"
    assert np.isfinite(found.arrays["stem.weight"].numpy()).all()


def test_the_way_down_costs_what_the_codec_costs_and_evaluation_nothing_twice():
    up, down = codecs.quantize4(), codecs.quantize8()
    plain, grid = grid_of(), grid_of(compress_mod(up, down))
    strategy().start(plain, random_model(), num_rounds=4)
    Compressed(strategy(), up, down).start(grid, random_model(), num_rounds=4)
    counter = len(app.Array(np.array(3)).data)
    first, later = grid.size(grid.sent[:3], "train"), grid.size(grid.sent[3:], "train")
    assert first == 3 * (
        counter + sum(len(app.Array(one).data) for n, one in numpy_of(random_model()).items() if n != COUNTER)
    )
    assert later == 3 * 3 * counter, "who evaluated the model has it"
    assert grid.size(grid.sent, "evaluate") == 3 * 4 * (FRAME + 54 + 3 * 4 + 1 + counter)


def test_a_node_that_forgot_the_model_is_sent_it_whole_after_one_error():
    up, down = codecs.identity(), codecs.quantize8()
    grid = grid_of(compress_mod(up, down))
    grid.spoil = lambda reply: grid.contexts.pop(2, None) if len(grid.sent) == 9 else None
    Compressed(strategy(fraction_evaluate=0.0), up, down).start(grid, random_model(), num_rounds=5)
    assert grid.errors() == ["RunError: this node holds no model, and was sent the changes up to version 3"]
    again = [m for m in grid.sent if m.metadata.dst_node_id == 2][4]
    assert "stem.weight" in again.content["arrays"]


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_client_without_the_mod_is_named():
    with pytest.raises(ConfigError, match=r"node 1 answered with plain arrays.*ClientApp\(mods=\[compress_mod\(quantize"):
        Compressed(strategy(), codecs.quantize4()).start(grid_of(strict=False), random_model(), num_rounds=1)


def test_a_server_without_the_wrapper_is_named():
    grid = grid_of(compress_mod(codecs.quantize4()))
    strategy().start(grid, random_model(), num_rounds=1)
    assert len(grid.errors()) == 3 and all("Compressed(strategy, codec)" in error for error in grid.errors())


def test_unlike_codecs_are_named():
    grid = grid_of(compress_mod(codecs.quantize8()))
    Compressed(strategy(), codecs.quantize4()).start(grid, random_model(), num_rounds=1)
    assert all("this node has codec = quantize(bits=8" in error for error in grid.errors()) and len(grid.errors()) >= 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda record: {"taciturn/update": b"tc"}, "a header alone has"),
        (lambda record: {"taciturn/update": record["taciturn/update"].data[:-1] + b"?"}, "checksum"),
        (lambda record: {"other": record["taciturn/update"].data}, None),
    ],
)
def test_what_cannot_be_read_is_left_out(spoil, said, monkeypatch):
    grid, errors = grid_of(compress_mod(codecs.quantize4())), []

    def bad(reply):
        if len(grid.sent) == 2 and not reply.has_error():
            arrays = {n: app.Array("uint8", (len(b),), "taciturn", b) for n, b in spoil(reply.content["arrays"]).items()}
            reply.content = app.RecordDict(dict(reply.content.items()) | {"arrays": app.ArrayRecord(arrays)})

    grid.spoil = bad
    inner = strategy()
    aggregate = inner.aggregate_train
    monkeypatch.setattr(inner, "aggregate_train", lambda r, replies: (errors.extend(replies), aggregate(r, replies))[1])
    if said is None:
        with pytest.raises(ConfigError, match="node 2 answered with plain arrays"):
            Compressed(inner, codecs.quantize4()).start(grid, random_model(), num_rounds=1)
        return
    found = Compressed(inner, codecs.quantize4()).start(grid, random_model(), num_rounds=1)
    reasons = [reply.error.reason for reply in errors if reply.has_error()]
    assert len(reasons) == 1 and said in reasons[0] and "node 2" in reasons[0]
    assert np.isfinite(found.arrays["stem.weight"].numpy()).all()


def test_what_is_not_finite_is_left_out_and_moves_no_memory():
    def diverged(node, x):
        y = moved(node, x)
        return y | {"stem.bias": y["stem.bias"] * np.float32("nan")} if node == 2 else y

    codec = codecs.error_feedback(codecs.top_k(share=0.2))
    grid = grid_of(compress_mod(codec), train=diverged)
    found = Compressed(strategy(fraction_evaluate=0.0), codec).start(grid, random_model(), num_rounds=3)
    wanted = oracle(codec, 3, lost={(t, 2) for t in (1, 2, 3)})
    assert all(np.array_equal(one, wanted[key]) for key, one in numpy_of(found.arrays).items())


def test_arrays_that_are_not_the_messages_are_refused():
    grid = grid_of(compress_mod(codecs.quantize4()), train=lambda node, x: {"other": np.zeros(3, np.float32)})
    Compressed(strategy(), codecs.quantize4()).start(grid, random_model(), num_rounds=1)
    assert all("the reply must have the" in e for e in grid.errors())


def test_a_model_without_float32_is_refused():
    start = record_of({"w": np.zeros(3)})
    grid = grid_of(compress_mod(codecs.quantize4()), train=lambda node, x: x)
    Compressed(strategy(fraction_evaluate=0.0), codecs.quantize4()).start(grid, start, num_rounds=1)
    assert all("no float32 array to encode" in error for error in grid.errors())
    with pytest.raises(ConfigError, match="no array is float32"):
        Compressed(strategy(), codecs.quantize4(), codecs.quantize8()).start(grid, start, num_rounds=1)


def test_a_way_down_with_a_memory_is_refused():
    with pytest.raises(ConfigError, match="the way down has its own"):
        compress_mod(codecs.quantize4(), codecs.error_feedback(codecs.top_k()))


def test_where_a_client_starts_is_the_app_s():
    with pytest.raises(ConfigError, match="decides where a client starts, and here the app does"):
        compress_mod(codecs.error_feedback(into="start"))
