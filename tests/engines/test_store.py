"""The store of clients' rows against plain dicts, and its commit against crashes and power cuts at any point."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core.errors import MethodError, RunError
from taciturn.core.state import equal, row, stack, tree_map
from taciturn.engines import journal
from taciturn.engines.rows import Rows
from taciturn.engines.store import ClientStore

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
N = 9
NEWCOMER = {"v": torch.arange(5.0), "deep": {"n": torch.tensor(3), "none": {}, "void": torch.zeros(2, 0)}}
OTHER = {"version": torch.tensor(-1)}


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Any bits at all."""
    raw = np.random.default_rng(seed).bytes(math.prod(like.shape) * like.dtype.itemsize)
    words = torch.tensor(list(raw), dtype=torch.uint8)
    return (words % 2 if like.dtype == torch.bool else words).view(like.dtype).reshape(like.shape)


def some(pattern, seed: int):
    """A record of these shapes and dtypes."""
    seeds = iter(range(1000 * seed, 1000 * seed + 1000))
    return tree_map(lambda t: noise(t, next(seeds)), pattern)


tensors = st.builds(
    lambda dtype, shape: torch.zeros(shape, dtype=dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
names = st.text("abcxyz_.0", min_size=1, max_size=4)
records = st.dictionaries(
    names, st.recursive(tensors, lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=6), max_size=4
)
cohorts = st.lists(st.integers(0, N - 1), unique=True, max_size=5)


def in_folder(tables, folder: Path, round: int | None = None):
    """A store with these tables {name: newcomer} in a folder."""
    store = ClientStore(N)
    rows = {name: store.table(name, newcomer) for name, newcomer in tables.items()}
    if round is None:
        store.create(folder)
    else:
        store.recover(folder, round)
    return store, rows


def content(rows) -> dict:
    """All rows of all tables, and which were written."""
    everyone = torch.arange(N)
    return {name: {"rows": table.read(everyone), "written": table.written()} for name, table in rows.items()}


# ------------------------------------------------------------------------------------------------------------ rows


@settings(max_examples=60)
@given(records, st.lists(st.tuples(cohorts, st.integers(0, 10**6)), max_size=5), st.booleans(), cohorts)
def test_rows_are_a_dict_of_records(pattern, writes, on_disk, asked):
    newcomer = some(pattern, 7)
    with tempfile.TemporaryDirectory() as folder:
        store = ClientStore(N)
        table, plain = store.table("own", newcomer), {}
        if on_disk:
            store.create(Path(folder))
        for ids, seed in writes:
            if ids:
                own = [some(pattern, seed + i) for i in ids]
                table.write(torch.tensor(ids), stack(own))
                plain |= dict(zip(ids, own, strict=True))
            if seed % 2:
                store.flush()
        found = table.read(torch.tensor(asked, dtype=torch.int64))
        assert all(equal(row(found, place), plain.get(i, newcomer)) for place, i in enumerate(asked))
        assert not asked or equal(found, stack([plain.get(i, newcomer) for i in asked])), "shapes and sub-records too"
        if table.width:
            assert table.written().nonzero().squeeze(1).tolist() == sorted(plain) == table.export()["ids"].tolist()


def test_what_is_read_is_a_copy():
    table = ClientStore(N).table("own", NEWCOMER)
    ids = torch.tensor([4])
    table.read(ids)["v"].add_(1)
    own = stack([some(NEWCOMER, 1)])
    table.write(ids, own)
    own["v"].zero_()
    table.read(ids)["v"].zero_()
    assert equal(row(table.read(ids), 0), some(NEWCOMER, 1))
    assert equal(row(table.read(torch.tensor([5])), 0), NEWCOMER)


def test_a_record_must_keep_its_shape():
    table = ClientStore(N).table("own", NEWCOMER)
    own = stack([NEWCOMER])
    with pytest.raises(MethodError, match=r"own/v\) must keep its shape and dtype: it began as \[5\] torch.float32"):
        table.write(torch.tensor([1]), own | {"v": own["v"].double()})
    with pytest.raises(MethodError, match=r"is now \[4\]"):
        table.write(torch.tensor([1]), own | {"v": own["v"][:, :4]})
    assert not table.written().any()


def test_a_million_clients_cost_what_took_part(tmp_path):
    store = ClientStore(1_000_000)
    table = store.table("own", {"v": torch.zeros(100)})
    store.create(tmp_path)
    ids = torch.randperm(1_000_000)[:200]
    table.write(ids, {"v": torch.ones(200, 100)})
    store.flush()
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert (tmp_path / "clients.own").stat().st_size > 400e6 and used < 4e6
    assert table.read(ids)["v"].eq(1).all()


@pytest.mark.parametrize("floats", [1000, 1024, 5000])
def test_rows_of_pages_have_their_place_on_the_disk(tmp_path, floats):
    store = ClientStore(40)
    table = store.table("own", {"v": torch.zeros(floats)})
    store.create(tmp_path)
    free = (tmp_path / "clients.own").stat().st_blocks
    ids, values = torch.tensor([39, 3, 4, 17]), torch.rand(4, floats)
    table._reserve(ids.numpy())
    reserved = (tmp_path / "clients.own").stat().st_blocks
    assert reserved >= free + 3 * floats * 4 // 512
    table.write(ids, {"v": values})
    store.flush()
    assert (tmp_path / "clients.own").stat().st_blocks == reserved, "writing took no more"
    assert torch.equal(table.read(ids)["v"], values) and not table.read(torch.tensor([5]))["v"].any()


# ---------------------------------------------------------------------------------------------------------- commit

steps = st.one_of(
    st.tuples(st.just("write"), cohorts, st.integers(0, 10**6)),
    st.tuples(st.just("touch"), cohorts, st.just(0)),
    st.tuples(st.sampled_from(["commit", "crash", "crash-to-older"]), st.just([]), st.just(0)),
)


@settings(max_examples=60)
@given(st.lists(steps, max_size=14))
def test_a_crash_leaves_the_checkpoint(todo):
    tables = {"own": NEWCOMER, "post": OTHER}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store, rows = in_folder(tables, folder)
        kept = {0: content(rows)}
        for what, ids, seed in todo:
            newest = max(kept)
            if what == "write" and ids:
                for name, newcomer in tables.items():
                    rows[name].write(torch.tensor(ids), stack([some(newcomer, seed + i) for i in ids]))
            elif what == "touch":
                store.touch(torch.tensor(ids, dtype=torch.int64))
            elif what == "commit":
                store.flush()
                store.touch(torch.tensor([0]))  # a round changes something
                kept = {newest: kept[newest], newest + 1: content(rows)}
                store.commit(newest + 1, oldest=newest)
            elif what.startswith("crash"):
                back = min(kept) if what == "crash-to-older" else newest
                store, rows = in_folder(tables, folder, back)
                assert equal(content(rows), kept[back])
                kept = {number: rest for number, rest in kept.items() if number <= back}


def committed(folder: Path):
    """A store with two batches of changes after its checkpoint of round 3; -> the state there, the store, its tables."""
    folder.mkdir(exist_ok=True)
    store, rows = in_folder({"own": NEWCOMER, "post": OTHER}, folder)
    ids = torch.arange(6)
    rows["own"].write(ids, stack([some(NEWCOMER, i) for i in range(6)]))
    store.flush()
    store.commit(3, oldest=3)
    before = content(rows)
    for cohort in (torch.tensor([1, 4, 7]), torch.tensor([8, 2])):
        rows["own"].write(cohort, stack([some(NEWCOMER, 50 + int(i)) for i in cohort]))
    return before, store, rows


def test_a_recovery_that_dies_can_be_done_again(tmp_path, monkeypatch):
    """Back over two checkpoints, killed at each deletion of a journal: the older one must be the last to go."""
    tables = {"own": NEWCOMER, "post": OTHER}
    before, store, rows = committed(tmp_path)
    for number in (4, 5):
        store.flush()
        store.commit(number, oldest=3)
        rows["own"].write(torch.tensor([1, number]), stack([some(NEWCOMER, number), some(NEWCOMER, 2 * number)]))
    real, left = os.unlink, 0

    def unlink(*arguments, **named):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        real(*arguments, **named)

    monkeypatch.setattr(os, "unlink", unlink)
    for allowed in (0, 1, 1):
        left = allowed
        with pytest.raises(KeyboardInterrupt):
            in_folder(tables, tmp_path, 3)
    left, events, flush = 9, [], Rows.flush
    monkeypatch.setattr(Rows, "flush", lambda table: (events.append(left), flush(table)))
    _, rows = in_folder(tables, tmp_path, 3)
    assert equal(content(rows), before) and left == 8
    assert events == [9, 9], "rows are on the disk before the last journal goes"


def test_the_journal_is_on_the_disk_before_a_row_changes(tmp_path, monkeypatch):
    store, rows = in_folder({"own": NEWCOMER}, tmp_path)
    events, sync, put = [], os.fsync, Rows.put
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr(Rows, "put", lambda *a: (events.append("put"), put(*a)))
    own = stack([NEWCOMER, NEWCOMER])
    rows["own"].write(torch.tensor([3, 5]), own)
    rows["own"].write(torch.tensor([5, 3]), own)  # is in the journal
    rows["own"].write(torch.tensor([5, 6]), own)
    store.commit(1, oldest=0)
    rows["own"].write(torch.tensor([5, 6]), own)
    assert events == ["sync", "sync", "put", "put", "sync", "put", "sync", "sync", "put"], "twice for a new file"


def test_a_torn_batch_had_changed_nothing(tmp_path):
    before, store, rows = committed(tmp_path / "a")
    path = tmp_path / "a" / "clients.journal.000003"
    whole = path.stat().st_size
    store.touch(torch.tensor([0, 3]))
    full = path.read_bytes()
    for length in range(whole, len(full), 3):
        for tail in (b"", b"\0" * (len(full) - length)):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "a", copy)
            (copy / path.name).write_bytes(full[:length] + tail)
            store, rows = in_folder({"own": NEWCOMER, "post": OTHER}, copy, 3)
            assert equal(content(rows), before) and not list(copy.glob("*journal*"))
            shutil.rmtree(copy)


def test_a_damaged_batch_is_no_torn_one(tmp_path):
    committed(tmp_path)
    path = tmp_path / "clients.journal.000003"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"journal.000003 is damaged at byte 0"):
        in_folder({"own": NEWCOMER, "post": OTHER}, tmp_path, 3)


@pytest.mark.parametrize("seed", range(8))
def test_a_power_cut_keeps_any_part_of_what_was_not_synced(tmp_path, seed):
    """Of rows that changed since the last sync any bytes may be on the disk; what the journal holds is there."""
    before, store, _ = committed(tmp_path)
    chance, path, width = np.random.default_rng(seed), tmp_path / "clients.own", store.describe()["own"]["bytes"]
    rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(N + 1, width).copy()
    for ((table, ids, old),) in journal.read(tmp_path / "clients.journal.000003", [width, 16], newest=True):
        assert table == 0
        was = old.view(np.uint8).reshape(len(ids), width)
        rows[ids] = np.where(chance.random(was.shape) < 0.5, rows[ids], was)
    path.write_bytes(rows.tobytes())
    _, tables = in_folder({"own": NEWCOMER, "post": OTHER}, tmp_path, 3)
    assert equal(content(tables), before)


# ---------------------------------------------------------------------------------------------------------- errors


def test_rows_of_another_shape_are_refused(tmp_path):
    in_folder({"own": NEWCOMER}, tmp_path)
    with pytest.raises(RunError, match=r"another shape.*resume it with the task and method it began with"):
        in_folder({"own": NEWCOMER | {"v": torch.zeros(6)}}, tmp_path, 1)
    with pytest.raises(RunError, match="another shape"):
        in_folder({"own": NEWCOMER, "post": OTHER}, tmp_path, 1)
    store = ClientStore(N + 1)
    store.table("own", NEWCOMER)
    with pytest.raises(RunError, match=r"\"clients\": 9.*\"clients\": 10"):
        store.recover(tmp_path, 1)


def test_missing_or_cut_files_are_named(tmp_path):
    store, rows = in_folder({"own": NEWCOMER}, tmp_path)
    rows["own"].write(torch.tensor([2]), stack([NEWCOMER]))
    store.flush()
    store.commit(1, oldest=1)
    rows["own"].write(torch.tensor([2]), stack([NEWCOMER]))
    os.rename(tmp_path / "clients.journal.000001", tmp_path / "clients.journal.000002")
    with pytest.raises(RunError, match=r"journal clients.journal.000001 is missing"):
        in_folder({"own": NEWCOMER}, tmp_path, 1)
    os.truncate(tmp_path / "clients.own", 100)
    with pytest.raises(RunError, match=r"clients.own has 100 bytes instead of"):
        in_folder({"own": NEWCOMER}, tmp_path, 1)
    (tmp_path / "clients.own").unlink()
    with pytest.raises(RunError, match=r"cannot open .*clients.own"):
        in_folder({"own": NEWCOMER}, tmp_path, 1)
    (tmp_path / "clients.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*clients.json"):
        in_folder({"own": NEWCOMER}, tmp_path, 1)


def test_a_full_disk_is_an_error_not_a_signal(tmp_path, monkeypatch):
    store, rows = in_folder({"own": NEWCOMER}, tmp_path)
    rows["own"].write(torch.tensor([1]), stack([some(NEWCOMER, 1)]))
    store.flush()
    store.commit(1, oldest=1)
    before, own = content(rows), stack([some(NEWCOMER, 2)])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        rows["own"].write(torch.tensor([1]), own)  # has its place
        with pytest.raises(RunError, match=r"cannot write .*clients.own: No space left.*last good checkpoint is kept"):
            rows["own"].write(torch.tensor([5]), own)
    length = (tmp_path / "clients.journal.000001").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot write .*journal.000001: No space left"):
            rows["own"].write(torch.tensor([6]), own)
    assert (tmp_path / "clients.journal.000001").stat().st_size == length, "no half batch"
    _, rows = in_folder({"own": NEWCOMER}, tmp_path, 1)
    assert equal(content(rows), before)


def test_a_newcomer_is_who_it_was_when_the_run_began(tmp_path):
    store, _ = in_folder({"own": {"v": torch.ones(3)}}, tmp_path)
    store.flush()
    store.commit(1, oldest=1)
    _, rows = in_folder({"own": {"v": torch.zeros(3)}}, tmp_path, 1)
    assert rows["own"].read(torch.tensor([4]))["v"].tolist() == [[1.0, 1.0, 1.0]]


def test_the_description_is_plain(tmp_path):
    in_folder({"own": NEWCOMER, "void": {}}, tmp_path)
    found = json.loads((tmp_path / "clients.json").read_text())
    assert found["tables"]["own"]["tensors"]["v"] == ["torch.float32", [5]] and not (tmp_path / "clients.void").exists()


@pytest.mark.parametrize("counts", [[3], [0, 2], [1, 1]])
def test_a_journal_gives_back_its_batches(tmp_path, counts):
    path, widths = tmp_path / "clients.journal.000000", [4, 9]
    parts = [
        (table, np.arange(count) * 7, np.frombuffer(os.urandom(count * widths[table]), f"V{widths[table]}"))
        for table, count in enumerate(counts)
    ]
    for _ in range(2):
        journal.append(path, parts)
    batches = list(journal.read(path, widths, newest=False))
    assert len(batches) == 2
    for batch in batches:
        for (table, ids, rows), (same, same_ids, same_rows) in zip(parts, batch, strict=True):
            assert table == same and ids.tolist() == same_ids.tolist() and rows.tobytes() == same_rows.tobytes()
    path.write_bytes(path.read_bytes()[:-1])
    assert len(list(journal.read(path, widths, newest=True))) == 1
    with pytest.raises(RunError, match="is damaged"):
        list(journal.read(path, widths, newest=False))
