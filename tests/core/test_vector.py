"""Laws of layouts: flat and named are two views of the same numbers.

Symbols: d values in all; vec [.., d].
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core.vector import Layout

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=5).map(tuple)
quick = settings(max_examples=60, deadline=None)


def layout_of(shapes: tuple[tuple[int, ...], ...]) -> Layout:
    return Layout(tuple(f"p{i}" for i in range(len(shapes))), shapes)


@quick
@given(shapes, st.sampled_from([(), (2,), (0,), (3, 2)]))
def test_views_cut_the_vector_in_order(shapes, lead):
    layout = layout_of(shapes)
    assert layout.d == sum(layout.sizes) == sum(math.prod(shape) for shape in shapes)
    vec = torch.arange(math.prod(lead) * layout.d, dtype=torch.float32).reshape(*lead, layout.d)
    views = layout.views(vec)
    assert tuple(views) == layout.names
    assert [tuple(view.shape) for view in views.values()] == [lead + shape for shape in shapes]
    parts = [view.reshape(*lead, n) for view, n in zip(views.values(), layout.sizes, strict=True)]
    joined = torch.cat([vec.new_zeros(*lead, 0), *parts], -1)
    assert torch.equal(joined, vec)


@quick
@given(shapes, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_flatten_is_the_inverse_of_views(shapes, dtype):
    layout = layout_of(shapes)
    vec = torch.arange(layout.d).to(dtype)
    views = layout.views(vec)
    assert Layout.of(views) == layout
    back = layout.flatten(dict(reversed(views.items())), dtype)
    assert torch.equal(back, vec) and back.dtype == dtype
    assert layout.flatten(views).dtype == torch.float32


def test_views_share_memory_and_flatten_copies():
    layout = Layout(("w", "s"), ((2, 2), ()))
    vec = torch.zeros(5)
    views = layout.views(vec)
    views["w"][1, 0] = 7
    views["s"].fill_(9)
    assert vec.tolist() == [0, 0, 7, 0, 9]
    flat = layout.flatten(views)
    views["w"].zero_()
    assert flat.tolist() == [0, 0, 7, 0, 9]
    alone = Layout(("w",), ((3,),))
    assert alone.flatten({"w": vec[:3]}).data_ptr() != vec.data_ptr(), "one tensor alone is copied too"


def test_flatten_reads_tensors_that_are_not_contiguous_and_keeps_the_gradient():
    layout = Layout(("w",), ((3, 2),))
    w = torch.arange(6.0).reshape(2, 3).requires_grad_()
    flat = layout.flatten({"w": w.T})
    assert flat.tolist() == [0, 3, 1, 4, 2, 5]
    flat[1].backward()
    assert w.grad.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_vmap_is_a_loop():
    layout = Layout(("w", "s", "none"), ((2, 3), (), (0,)))
    vecs = torch.randn(4, 7)
    named = torch.vmap(layout.views)(vecs)
    assert all(torch.equal(named[name][2], view) for name, view in layout.views(vecs[2]).items())
    assert torch.equal(torch.vmap(layout.flatten)(named), vecs)


def test_a_missing_name_is_an_error():
    with pytest.raises(KeyError, match="b"):
        Layout(("a", "b"), ((1,), (1,))).flatten({"a": torch.zeros(1)})


def test_fingerprints_differ_where_layouts_differ():
    layouts = [
        Layout((), ()), Layout(("a",), ((2,),)), Layout(("b",), ((2,),)), Layout(("a",), ((1, 2),)), Layout(("a",), ((),)),
        Layout(("a", "b"), ((1,), (2,))), Layout(("b", "a"), ((2,), (1,))), Layout(("a", "b"), ((2,), (1,))),
        Layout(("a, b",), ((2,),)),
    ]  # fmt: skip
    prints = [layout.fingerprint for layout in layouts]
    assert len(set(prints)) == len(prints) and all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    assert Layout(("a",), ((2,),)).fingerprint == Layout.of({"a": torch.ones(2)}).fingerprint
