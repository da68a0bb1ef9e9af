"""Laws of records: what is stacked, flattened or saved comes back in every bit; a failing write leaves the old file."""

from __future__ import annotations

import errno
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from taciturn.core import state as module
from taciturn.core.errors import RunError
from taciturn.core.state import (
    clone,
    equal,
    flatten,
    leaves,
    load_state,
    row,
    save_state,
    stack,
    tree_map,
    unflatten,
    where,
    write_atomic,
)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
quick = settings(max_examples=40, deadline=None)


def noise(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits at all, so NaN payloads, infinities and subnormals too."""
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    words = torch.tensor(list(raw), dtype=torch.uint8)
    return (words % 2 if dtype == torch.bool else words).view(dtype).reshape(shape)


tensors = st.builds(
    noise, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3).map(tuple), st.integers(0, 2**31)
)
names = st.text("abcxyz_.0", min_size=1, max_size=4)
records = st.dictionaries(
    names,
    st.recursive(tensors, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=6),
    max_size=4,
)


def like(pattern, seed: int):
    """Another record of the same shapes and dtypes."""
    seeds = iter(range(seed, seed + 1000))
    return tree_map(lambda t: noise(t.dtype, tuple(t.shape), next(seeds)), pattern)


# ------------------------------------------------------------------------------------------------------- trees


@quick
@given(records)
def test_unflatten_is_the_inverse_of_flatten(state):
    flat = flatten(state)
    assert all(isinstance(value, torch.Tensor) for value in flat.values())
    assert equal(unflatten(flat), state)
    assert all(a is b for a, b in zip(flat.values(), leaves(state), strict=True)), "in order, and no copies"


def test_flatten_joins_names_with_a_slash():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert list(flatten({"x": {"y": {"z": a}, "w": b}, "v": c})) == ["x/y/z", "x/w", "v"]


@quick
@given(records, st.integers(1, 4), st.integers(0, 2**20))
def test_row_is_the_inverse_of_stack(pattern, m, seed):
    states = [like(pattern, seed + 1000 * i) for i in range(m)]
    stacked = stack(states)
    assert all(leaf.shape[0] == m for leaf in leaves(stacked))
    assert all(equal(row(stacked, i), one) for i, one in enumerate(states))


@quick
@given(records, st.booleans(), st.integers(0, 2**20))
def test_where_takes_the_whole_record(pattern, mask, seed):
    new, old = like(pattern, seed), like(pattern, seed + 1000)
    assert equal(where(torch.tensor(mask), new, old), new if mask else old)


def test_where_under_vmap_is_row_by_row():
    new, old = ({"a": torch.full((4, 2), v), "b": {"c": torch.full((4,), int(v))}} for v in (1.0, 2.0))
    mask = torch.tensor([True, False, False, True])
    picked = torch.vmap(where)(mask, new, old)
    for i in range(4):
        assert equal(row(picked, i), row(new if mask[i] else old, i))


def test_tree_map_pairs_by_name_not_by_place():
    a = {"x": torch.tensor(1), "y": {"z": torch.tensor(2)}}
    b = {"y": {"z": torch.tensor(20)}, "x": torch.tensor(10)}
    assert equal(tree_map(torch.add, a, b), {"x": torch.tensor(11), "y": {"z": torch.tensor(22)}})


@quick
@given(records)
def test_clone_shares_no_memory(state):
    copy = clone(state)
    assert equal(copy, state)
    for a, b in zip(leaves(copy), leaves(state), strict=True):
        assert a.numel() == 0 or a.data_ptr() != b.data_ptr()


@quick
@given(records.filter(lambda s: any(leaf.numel() for leaf in leaves(s))), st.data())
def test_equal_sees_every_bit(state, data):
    assert equal(state, clone(state))
    changed = clone(state)
    leaf = data.draw(st.sampled_from([leaf for leaf in leaves(changed) if leaf.numel()]))
    raw = leaf.reshape(-1).view(torch.uint8) if leaf.is_contiguous() else None
    assert raw is not None
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 if leaf.dtype == torch.bool else 1 << data.draw(st.integers(0, 7))
    assert not equal(state, changed) and not equal(changed, state)


def test_equal_sees_names_shapes_dtypes_and_structure():
    one = {"a": torch.zeros(2)}
    nan = torch.tensor([float("nan"), -0.0])
    others = [
        {"b": torch.zeros(2)}, {"a": torch.zeros(2, 1)}, {"a": torch.zeros(2, dtype=torch.int32)}, {}, torch.zeros(2),
        {"a": {"a": torch.zeros(2)}}, one | {"b": torch.zeros(0)}, {"a": torch.tensor([0.0, -0.0])},
    ]  # fmt: skip
    assert not any(equal(one, other) or equal(other, one) for other in others)
    assert equal({"a": nan}, {"a": nan.clone()}) and equal({}, {})
    assert equal({"a": torch.arange(6).reshape(2, 3).T}, {"a": torch.tensor([[0, 3], [1, 4], [2, 5]])})


# -------------------------------------------------------------------------------------------------------- files


@quick
@given(state=records)
def test_load_is_the_inverse_of_save(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "law.safetensors"
    meta = {"round": 3, "name": "äöü", "nested": {"list": [1, 2.5, None, True]}}
    save_state(path, state, meta)
    back, back_meta = load_state(path)
    assert equal(back, state) and back_meta == meta
    assert not path.with_name(path.name + ".part").exists()


def test_views_parameters_and_shared_memory_are_saved_by_value(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    state = {"t": base.T, "same": base, "again": base, "p": torch.nn.Parameter(torch.ones(2)), "row": base[1]}
    save_state(tmp_path / "s", state, {})
    back, _ = load_state(tmp_path / "s")
    assert equal(back, tree_map(lambda t: t.detach().clone(), state))
    back["same"].zero_()
    assert torch.equal(back["again"], base)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """A file that takes a few bytes and then no more."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[:10])
        raise FULL


def refuse(*_, **__):
    raise FULL


BREAKS = {
    "write": (module, "open", lambda path, mode: FullDisk(path.open(mode))),
    "fsync": (module.os, "fsync", refuse),
    "replace": (module.os, "replace", refuse),
}


@pytest.mark.parametrize("where_it_breaks", BREAKS)
def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch, where_it_breaks):
    path = tmp_path / "checkpoint.safetensors"
    old, new = {"a": torch.arange(5)}, {"a": torch.arange(7)}
    save_state(path, old, {"round": 1})
    with monkeypatch.context() as patch:
        owner, name, broken = BREAKS[where_it_breaks]
        patch.setattr(owner, name, broken, raising=False)
        with pytest.raises(RunError, match="No space left on device; what was there before is kept") as failure:
            save_state(path, new, {"round": 2})
    assert str(path) in str(failure.value)
    back, meta = load_state(path)
    assert equal(back, old) and meta == {"round": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "a part was left behind"
    save_state(path, new, {"round": 2})
    assert equal(load_state(path)[0], new)


def test_nothing_is_renamed_before_it_is_on_disk(tmp_path, monkeypatch):
    """write, fsync of the file, rename, fsync of the folder: in this order."""
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(module.os, "replace", lambda a, b: (seen.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "file", [b"ab", b"", b"c"])
    assert seen == [str(tmp_path / "file.part"), "replace", str(tmp_path)]
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "missing" / "s", tmp_path / "file" / "s", tmp_path):
        with pytest.raises(RunError, match=f"cannot write {path}"):
            save_state(path, {"a": torch.zeros(1)}, {})
    assert (tmp_path / "file").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_broken_file_is_a_run_error(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"a": torch.arange(100), "b": {"c": torch.zeros(3)}}, {"round": 1})
    good = path.read_bytes()
    broken = [good[:n] for n in (0, 1, 7, 8, 9, 60, len(good) // 2, len(good) - 1)]
    broken += [b"\xff" * 8 + good[8:], good[:8] + b"[" + good[9:], good + b"x", b"not a checkpoint at all" * 20]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(RunError, match=f"cannot read {path}"):
            load_state(path)
    save_file({"a": torch.zeros(2)}, path)  # a safetensors file, but not one of ours
    for other in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(RunError, match=f"cannot read {other}"):
            load_state(other)
