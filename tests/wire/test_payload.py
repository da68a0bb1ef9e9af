"""Control fields: what they let travel, in how many bytes, and what of them is refused.

The body is written here once more, by hand and with whole numbers of any size, from the text of `core/payload.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bench.fuzz_wire import canonical, valid_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core.errors import WireError
from taciturn.core.kernel import without_library
from taciturn.core.payload import GROUP, LOSSLESS, controlled, governed, least_bytes, nbytes
from taciturn.core.state import row, stack
from taciturn.wire.format import FRAME, Frame, Schema, pack, packed_bytes, unpack

quick = settings(max_examples=150, deadline=None)
seeds = st.integers(0, 2**32).map(lambda seed: valid_payload(np.random.default_rng(seed)))


def u8(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.uint8)


def i32(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


def bits(values: list[int], width: int) -> bytes:
    """Numbers of `width` bits in one long number, the first in the lowest bits."""
    return sum(value << (i * width) for i, value in enumerate(values)).to_bytes((len(values) * width + 7) // 8, "little")


def groups(values: list[int], q: int) -> bytes:
    """Groups of n symbols as numbers of base q; the last in as few bytes as hold it."""
    many, size = GROUP[q]
    out = b""
    for at in range(0, len(values), many):
        group = values[at : at + many]
        number = sum(value * q**i for i, value in enumerate(group))
        out += number.to_bytes(
            size if len(group) == many else math.ceil(((q ** len(group)) - 1).bit_length() / 8), "little"
        )
    return out


def by_hand(payload: dict) -> bytes:
    """The body of a payload without a marker."""
    controls, data = b"", b""
    for name, tensor in sorted(payload.items()):
        kept = torch.ones(tensor.shape, dtype=torch.bool)
        if f"{name}.count" in payload:
            kept[int(payload[f"{name}.count"]) :] = False
        if f"{name}.mask" in payload:
            mask = payload[f"{name}.mask"]
            kept = kept & mask.reshape((*mask.shape, *[1] * (tensor.dim() - mask.dim()))).expand(tensor.shape)
        values = tensor[kept] if tensor.dim() else tensor.reshape(1)[kept.reshape(1)]
        if f"{name}.radix" in payload:
            part = groups(values.tolist(), int(payload[f"{name}.radix"]) + 1)
        elif f"{name}.width" in payload:
            part = bits(values.tolist(), int(payload[f"{name}.width"]))
        elif tensor.dtype == torch.bool:
            part = bits([int(value) for value in values.tolist()], 1)
        else:
            part = b"".join(bytes(value.clone().reshape(1).view(torch.uint8).tolist()) for value in values.reshape(-1))
        if governed(name)[1]:
            controls += part
        else:
            data += part
    return controls + data


def same(a: dict, b: dict) -> bool:
    """Names, dtypes, shapes and bits."""
    return list(a) == list(b) and all(
        (x.dtype, x.shape, x.clone().reshape(-1).view(torch.uint8).tolist() if x.numel() else [])
        == (y.dtype, y.shape, y.clone().reshape(-1).view(torch.uint8).tolist() if y.numel() else [])
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def travel(payload: dict) -> tuple[bytes, dict]:
    """The body, and what arrives."""
    data, schema = pack(Frame("update", payload)), Schema.of(payload)
    return data[FRAME:], unpack(data, {schema.id: schema}).payload


# ------------------------------------------------------------------------------------------------------------ the laws


@quick
@given(seeds)
def test_bytes_are_the_documented_ones_and_nbytes_knows_how_many(payload):
    payload.pop(LOSSLESS, None)
    body, arrived = travel(payload)
    assert body == by_hand(payload)
    assert len(body) == int(nbytes(payload)) == packed_bytes(payload) and nbytes(payload).dtype == torch.int64
    assert same(arrived, canonical(payload))
    again, _ = travel(arrived)
    assert again == body, "what arrived is packed to the same bytes"


@quick
@given(seeds)
def test_c_and_numpy_write_the_same_bytes_and_read_each_others(payload):
    body, arrived = travel(payload)
    with without_library():
        slow, other = travel(payload)
    assert body == slow and same(arrived, other)
    marker = arrived.pop(LOSSLESS, None)
    assert same(arrived, canonical(payload))
    assert marker is None or int(marker) in (0, int(payload[LOSSLESS]))
    assert len(body) == packed_bytes(payload) <= int(nbytes(payload))


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 2**32))
def test_nbytes_under_vmap_is_nbytes_of_each_row(payload, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(4):
        other = dict(payload)
        for name, tensor in payload.items():
            of, control = governed(name)
            if control == "mask":
                other[name] = torch.from_numpy(np.asarray(rng.random(tensor.shape) < 0.5))
            elif control:
                most = {"count": payload[of].shape[0] if payload[of].dim() else 0, "radix": 255, "width": 15}[control]
                other[name] = torch.tensor(int(rng.integers(0, most + 1)), dtype=tensor.dtype)
        rows.append(other)
    sizes = torch.vmap(nbytes)(stack(rows))
    assert sizes.dtype == torch.int64 and sizes.tolist() == [int(nbytes(one)) for one in rows]
    assert [int(nbytes(row(stack(rows), i))) for i in range(4)] == sizes.tolist()


# ----------------------------------------------------------------------------------------------------------- the table


def test_groups_waste_least():
    known = {
        1: (1, 0),
        2: (8, 1),
        3: (5, 1),
        4: (4, 1),
        5: (24, 7),
        7: (17, 6),
        15: (2, 1),
        16: (2, 1),
        255: (1, 1),
        256: (1, 1),
    }
    assert {q: GROUP[q] for q in known} == known
    for q in range(2, 257):
        many, size = GROUP[q]
        assert q**many <= 256**size < 256**9
        for other in range(1, 9):
            most = 0
            while q ** (most + 1) <= 256**other:
                most += 1
            assert most * size <= many * other
            assert most * size < many * other or other >= size, f"q = {q}: {other} bytes waste as little"


def test_the_last_group_takes_what_it_needs():
    assert [least_bytes(15, n) for n in range(4)] == [0, 1, 1, 2] and least_bytes(256, 3) == 3 and least_bytes(1, 7) == 0
    for q, n in ((7, 17), (7, 18), (7, 33), (5, 25), (2, 9), (3, 6), (1, 100)):
        payload = {"x": torch.zeros(n, dtype=torch.uint8), "x.radix": u8(q - 1)}
        assert int(nbytes(payload)) == 1 + len(groups([0] * n, q))


def test_documented_bytes():
    codes = {"c": torch.tensor([2, 0, 1, 2, 2, 1], dtype=torch.uint8), "c.radix": u8(2)}
    assert travel(codes)[0].hex() == "02" + "e3" + "01"  # 2 + 0 * 3 + 1 * 9 + 2 * 27 + 2 * 81 = 227; 1
    nibbles = {"c": torch.tensor([1, 2, 15], dtype=torch.uint8), "c.radix": u8(15)}
    assert travel(nibbles)[0].hex() == "0f" + "210f"
    places = {"i": torch.tensor([1, 2, 3, 0], dtype=torch.int32), "i.width": u8(3), "i.count": i32(3)}
    assert travel(places)[0].hex() == "03000000" + "03" + "d100"  # 1 + 2 << 3 + 3 << 6 = 209
    nothing = {"v": torch.ones(5), "v.mask": torch.tensor(False)}
    body, arrived = travel(nothing)
    assert body.hex() == "00" and torch.equal(arrived["v"], torch.zeros(5))


def test_dots_and_slashes_in_names():
    payload = {
        "a.b/c": torch.ones(2, 2),
        "a.b/c.count": i32(1),
        "a.b": torch.ones(1),
        "mask": torch.ones(1),
        "count": i32(9),
    }
    body, arrived = travel(payload)
    assert len(body) == 4 + 8 + 4 + 4 + 4 and torch.equal(arrived["a.b/c"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert controlled(payload) and not controlled({"mask": 0, "a.b": 0}) and controlled({LOSSLESS: 0})


# ----------------------------------------------------------------------------------------------------- what is refused

X, CODES = torch.zeros(4, 3), torch.zeros(6, dtype=torch.uint8)
SENSELESS = {
    "nothing to govern": ({"x.radix": u8(1)}, "'x.radix' governs 'x', which is no data field"),
    "govern a control": ({"x": X, "x.count": i32(1), "x.count.width": u8(3)}, "which is no data field"),
    "govern the marker": ({"lossless": u8(0), "lossless.radix": u8(1)}, "which is no data field"),
    "radix of a float": ({"x": X, "x.radix": u8(1)}, "packs symbols of uint8, but 'x' is float32"),
    "radix too wide": ({"x": CODES, "x.radix": torch.tensor(1)}, "'x.radix' must be uint8 of shape ()"),
    "radix of rows": ({"x": CODES, "x.radix": torch.zeros(2, dtype=torch.uint8)}, "'x.radix' must be uint8 of shape ()"),
    "width of a float": ({"x": X, "x.width": u8(1)}, "packs whole numbers"),
    "width of bytes": ({"x": CODES, "x.width": u8(1)}, "packs whole numbers"),
    "width as int32": ({"x": CODES.int(), "x.width": i32(1)}, "'x.width' must be uint8 of shape ()"),
    "count of a scalar": ({"x": torch.zeros(()), "x.count": i32(1)}, "counts rows, but 'x' has shape ()"),
    "count as int64": ({"x": X, "x.count": torch.tensor(1)}, "'x.count' must be int32 of shape ()"),
    "mask of another shape": ({"x": X, "x.mask": torch.ones(3, dtype=torch.bool)}, "its shape a prefix of"),
    "mask of more axes": ({"x": CODES, "x.mask": torch.ones(6, 1, dtype=torch.bool)}, "its shape a prefix of"),
    "mask of bytes": ({"x": X, "x.mask": torch.ones(4, dtype=torch.uint8)}, "must be bool"),
    "marker as int64": ({"x": X, "lossless": torch.tensor(1)}, "'lossless' marks what is compressed: uint8 of shape ()"),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_control_fields_that_make_no_sense(name):
    payload, message = SENSELESS[name]
    with pytest.raises(WireError) as failure:
        Schema.of(payload)
    assert message in str(failure.value)
    rows = [[n, str(t.dtype)[len("torch.") :], list(t.shape)] for n, t in payload.items()]
    with pytest.raises(WireError):
        Schema.parse(str(rows).replace("'", '"').encode())


WRONG = {
    "symbol": ({"x": CODES + 3, "x.radix": u8(2)}, "payload 'x': symbol 3 at place 0 of a code with 3 symbols"),
    "symbol in the last group": (
        {"x": torch.tensor([0, 0, 0, 0, 0, 9], dtype=torch.uint8), "x.radix": u8(2)},
        "symbol 9 at place 5",
    ),
    "value": ({"x": torch.tensor([3, 8]), "x.width": u8(3)}, "payload 'x': value 8 at place 1 of numbers of 3 bits"),
    "negative": ({"x": torch.tensor([-1], dtype=torch.int16), "x.width": u8(15)}, "value -1 at place 0"),
    "value of no bits": ({"x": torch.tensor([0, 1]), "x.width": u8(0)}, "value 1 at place 1 of numbers of 0 bits"),
    "width": ({"x": torch.tensor([1], dtype=torch.int16), "x.width": u8(16)}, "numbers of 16 bits in a field of int16"),
    "width of 63": ({"x": torch.tensor([1]), "x.width": u8(63)}, "numbers of 63 bits in a field of int64; at most 62"),
    "count": ({"x": X, "x.count": i32(5)}, "payload 'x': a count of 5; there are 4 rows"),
    "negative count": ({"x": X, "x.count": i32(-1)}, "payload 'x': a count of -1"),
    "coder": ({"x": X, "lossless": u8(3)}, "asks for coder 3; coders are 0 to 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_do_not_fit(name):
    payload, message = WRONG[name]
    for _ in range(2):
        with pytest.raises(WireError) as failure:
            pack(Frame("update", payload))
        assert message in str(failure.value)
        with without_library(), pytest.raises(WireError) as slow:
            pack(Frame("update", payload))
        assert str(slow.value) == str(failure.value)


def test_what_is_not_selected_may_be_anything():
    payload = {"x": torch.tensor([1, 9], dtype=torch.uint8), "x.radix": u8(2), "x.count": i32(1)}
    body, arrived = travel(payload)
    assert body.hex() == "01000000" + "02" + "01" and arrived["x"].tolist() == [1, 0]
