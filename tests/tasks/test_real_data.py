"""The public data sets: published counts, and what held-out samples must never share with training samples."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from taciturn.core.errors import ConfigError, DataError
from taciturn.tasks import data
from taciturn.tasks.data.clients import TableClients
from taciturn.tasks.data.real import _stretches

pytest.importorskip("pyarrow", reason="heart and air need pyarrow")
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def place(name: str) -> str:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not on this machine")
    return str(folder)


def rows_of(clients: TableClients) -> dict[str, np.ndarray]:
    parts = np.split(clients.rows.numpy(), clients.offsets[1:-1].numpy())
    return dict(zip(clients.names, parts, strict=True))


def check(federation, clients, shape):
    """What holds for all: shapes, dtypes, standardized training rows, no row in two parts."""
    train = federation.train
    assert len(train.names) == clients
    x, target = train.fields["input"], train.fields["target"]
    assert x.shape[1:] == shape and x.dtype == torch.float32 and x.isfinite().all()
    if federation.kind == "regression":
        assert target.shape == (len(x), 1) and target.dtype == torch.float32
    else:
        assert target.shape == (len(x),) and target.dtype == torch.int64
        assert target[train.rows].unique().tolist() == list(range(federation.outputs))
    parts = [part.rows for part in (train, federation.validation, federation.test, federation.central) if part]
    rows = torch.cat(parts)
    assert len(rows.unique()) == len(rows)


def standardized(federation):
    seen = federation.train.fields["input"][federation.train.rows].flatten(0, -2).double()
    assert seen.mean(0).abs().max() < 1e-4
    assert (seen.std(0) - 1).abs().max() < 1e-3


def test_turbofan():
    start = time.perf_counter()
    federation = data.turbofan(place("cmapss")).load(0)
    assert time.perf_counter() - start < 10
    check(federation, 100, (30, 14))
    standardized(federation)
    assert int(federation.train.sizes.sum()) == 20631 - 100 * 29  # published rows, less what windows cost
    target = federation.train.fields["target"][:, 0]
    first = rows_of(federation.train)["engine-001"]
    assert len(first) == 192 - 29 and target[first[-1]] == 0 and target[first[0]] == 1
    assert target[first[-5]].item() == pytest.approx(4 / 125)
    assert federation.central.sizes.tolist() == [100] and federation.test is None
    central = target[federation.central.rows] * 125
    assert central[:3].tolist() == pytest.approx([112, 98, 69])


def test_turbofan_windows_of_two_parts_never_overlap():
    federation = data.turbofan(place("cmapss"), window=10, test=0.2, validation=0.1).load(4)
    check(federation, 100, (10, 14))
    parts = [rows_of(part) for part in (federation.train, federation.validation, federation.test)]
    for name in federation.train.names:
        own = [part[name] for part in parts if name in part]
        for i, a in enumerate(own):
            for b in own[i + 1 :]:
                assert np.abs(a[:, None] - b[None, :]).min() >= 10


def test_turbofan_other_windows_and_wrong_fields():
    folder = place("cmapss")
    federation = data.turbofan(folder, window=50, sensors=("s2", "setting1"), max_rul=130).load(0)
    check(federation, 100, (50, 2))
    assert "engines shorter than the window left out" in federation.note and federation.central.sizes.item() < 100
    with pytest.raises(ConfigError, match="there is no sensor 's22'; did you mean"):
        data.turbofan(folder, sensors=("s22",)).load(0)
    with pytest.raises(DataError, match="longer than the life of every engine"):
        data.turbofan(folder, window=1000).load(0)


def test_stretches_are_contiguous_and_leave_gaps():
    owners = {"a": np.arange(100), "short": np.arange(100, 104)}
    train, validation, test = _stretches(owners, 3, test=0.2, validation=0.1, seed=1)
    assert (np.diff(test["a"]) == 1).all() and len(test["a"]) == 20 and len(validation["a"]) == 10
    assert test["a"][0] - validation["a"][-1] == 4
    assert "short" not in test and train["short"].tolist() == [100, 101, 102, 103]


def test_activity():
    start = time.perf_counter()
    federation = data.activity(place("hapt")).load(0)
    assert time.perf_counter() - start < 10
    check(federation, 30, (128, 6))
    standardized(federation)
    assert federation.outputs == 6 and federation.test.names == federation.train.names
    for a, b in zip(rows_of(federation.train).values(), rows_of(federation.test).values(), strict=True):
        assert a.max() < b.min()  # the later experiment is the test


def test_activity_with_transitions_by_fraction():
    source = data.activity(place("hapt"), transitions=True, held_out="fraction", test=0.25, validation=0.1)
    federation = source.load(3)
    check(federation, 30, (128, 6))
    assert federation.outputs == 12
    held, whole = int(federation.test.sizes.sum()), len(federation.train.fields["input"])
    assert 0.15 < held / whole <= 0.25
    again = source.load(3)
    assert torch.equal(federation.test.rows, again.test.rows)
    assert not torch.equal(federation.test.rows, source.load(4).test.rows)
    with pytest.raises(ConfigError, match="held_out: experiment or fraction"):
        data.activity(place("hapt"), held_out="user").load(0)  # type: ignore[arg-type]


def test_heart():
    federation = data.heart(place("heart_disease")).load(0)
    check(federation, 4, (23,))
    assert federation.train.names == ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
    sizes = (federation.train.sizes + federation.test.sizes).tolist()
    assert sizes == [304, 293, 123, 200]
    assert len(federation.train.fields["target"]) == 920 and federation.outputs == 2
    target = federation.train.fields["target"]
    rows = np.concatenate([rows_of(part)["Switzerland"] for part in (federation.train, federation.test)])
    assert target[rows].float().mean().item() == pytest.approx(0.93, abs=0.01)
    file = str(Path(place("heart_disease")) / "heart_disease_uci.csv")
    assert torch.equal(data.heart(file).load(0).train.rows, federation.train.rows)


def test_air():
    start = time.perf_counter()
    federation = data.air(place("beijing_air")).load(0)
    assert time.perf_counter() - start < 10
    check(federation, 12, (16,))
    standardized(federation)
    assert len(federation.train.fields["input"]) == 420768 - 8739  # published rows, less those without PM2.5
    assert "Dongsi" in federation.train.names
    assert federation.train.fields["target"].mean().item() == pytest.approx(0.798, abs=1e-3)
    for a, b in zip(rows_of(federation.train).values(), rows_of(federation.test).values(), strict=True):
        assert a.max() < b.min()  # later


def test_air_ahead_of_time():
    federation = data.air(place("beijing_air"), horizon=24, every_nth=24, validation=0.1, target_scale=1.0).load(0)
    check(federation, 12, (17,))
    assert int(federation.train.sizes.max()) <= 35064 * 0.7 / 24 + 1
    parts = [rows_of(part) for part in (federation.train, federation.validation, federation.test)]
    for name in federation.train.names:
        assert parts[0][name].max() < parts[1][name].min() and parts[1][name].max() < parts[2][name].min()


SOURCES = {"turbofan": "train_FD001.txt", "activity": "hapt.npz", "heart": "heart_disease_uci.csv", "air": ".csv"}


@pytest.mark.parametrize(("name", "file"), SOURCES.items())
def test_a_folder_without_the_data(tmp_path, name, file):
    with pytest.raises(DataError, match=rf"holds no {file}|no {file} \(or {file}.gz\) in .*; files there: none"):
        getattr(data, name)(str(tmp_path)).load(0)
    with pytest.raises(DataError, match=r"gone is not there; give the folder with the data"):
        getattr(data, name)(str(tmp_path / "gone")).load(0)


def test_broken_files(tmp_path):
    (tmp_path / "train_FD001.txt").write_text("1 2 x")
    with pytest.raises(DataError, match=r"train_FD001.txt is no table of numbers"):
        data.turbofan(str(tmp_path)).load(0)
    np.savez(tmp_path / "hapt.npz", x=np.zeros((3, 6)))
    with pytest.raises(DataError, match=r"hapt.npz: there is no array 'label'"):
        data.activity(str(tmp_path)).load(0)
