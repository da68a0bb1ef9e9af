"""The format of messages: what is packed comes back in every bit, and nothing else comes back at all.

Header and body are written here once more, by hand, from the text at the top of `wire/format.py`; what control fields do is
in `test_payload.py`.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core.errors import WireError
from taciturn.wire.format import FRAME, KINDS, LARGEST, Frame, Schema, nbytes, pack, pack_schema, unpack, unpack_schema

DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
COUNTERS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=80, deadline=None)


def noise(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits at all, so NaN payloads, infinities and subnormals too."""
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * DTYPES[dtype])
    words = torch.tensor(list(raw), dtype=torch.uint8)
    return (words % 2 if dtype == "bool" else words).view(getattr(torch, dtype)).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    if tensor.dtype == torch.bool:
        bits = tensor.reshape(-1).tolist()
        return bytes(sum(bit << k for k, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def seal(body=b"", *, magic=b"tc", version=2, kind=3, schema=0, counters=(0, 0, 0, 0)) -> bytes:
    """A message by hand, with a checksum that fits."""
    head = magic + struct.pack("<BBI4I", version, kind, schema, *counters)
    return head + struct.pack("<I", zlib.crc32(head + body)) + body


tensors = st.builds(
    noise, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3).map(tuple), st.integers(0, 2**31)
)
payloads = st.dictionaries(st.text(max_size=5), tensors, max_size=4)
frames = st.builds(Frame, st.sampled_from(KINDS[1:]), payloads, COUNTERS, COUNTERS, COUNTERS, COUNTERS)


def schemas_of(*payloads: dict) -> dict[int, Schema]:
    return {schema.id: schema for schema in map(Schema.of, payloads)}


# --------------------------------------------------------------------------------------------------- round trip


@quick
@given(frames)
def test_unpack_is_the_inverse_of_pack(frame):
    data = pack(frame)
    back = unpack(data, schemas_of(frame.payload))
    assert (back.kind, back.round, back.client) == (frame.kind, frame.round, frame.client)
    assert (back.generation, back.durable) == (frame.generation, frame.durable)
    assert list(back.payload) == sorted(frame.payload)
    for name, tensor in frame.payload.items():
        got = back.payload[name]
        assert (got.dtype, got.shape, raw(got)) == (tensor.dtype, tensor.shape, raw(tensor))


@quick
@given(payloads)
def test_bytes_of_a_message(payload):
    data = pack(Frame("update", payload))
    assert len(data) == FRAME + int(nbytes(payload)) == FRAME + sum(len(raw(t)) for t in payload.values())
    assert Schema.of(payload).dense == sum(t.numel() * t.element_size() for t in payload.values())
    assert nbytes(payload).dtype == torch.int64


@quick
@given(frames)
def test_the_bytes_are_the_documented_ones(frame):
    body = b"".join(raw(tensor) for _, tensor in sorted(frame.payload.items()))
    shapes = [[n, str(t.dtype)[len("torch.") :], list(t.shape)] for n, t in sorted(frame.payload.items())]
    text = json.dumps(shapes, separators=(",", ":")).encode()
    counters = (frame.round, frame.client, frame.generation, frame.durable)
    by_hand = {"kind": KINDS.index(frame.kind), "schema": zlib.crc32(text), "counters": counters}
    assert pack(frame) == seal(body, **by_hand)
    assert pack_schema(Schema.of(frame.payload), round=7, client=9) == seal(
        text, kind=0, schema=zlib.crc32(text), counters=(7, 9, 0, 0)
    )


def test_a_header_is_at_most_32_bytes():
    assert FRAME == len(pack(Frame("monitor", {}))) == 28 <= 32


def test_numbers_are_little_endian():
    payload = {
        "a": torch.tensor([1, 2**24]),
        "b": torch.tensor(1.0, dtype=torch.bfloat16),
        "c": torch.tensor([True, False]),
    }
    assert pack(Frame("update", payload))[FRAME:].hex() == "0100000000000000" + "0000000100000000" + "803f" + "01"


def test_nbytes_under_vmap_is_nbytes_of_each_row():
    stacked = {"q": torch.zeros(5, 3, 2, dtype=torch.int8), "s": torch.zeros(5), "none": torch.zeros(5, 0)}
    sizes = torch.vmap(nbytes)(stacked)
    rows = [{name: tensor[i] for name, tensor in stacked.items()} for i in range(5)]
    assert sizes.tolist() == [len(pack(Frame("update", row))) - FRAME for row in rows] == [10] * 5


def test_views_and_parameters_are_packed_by_value():
    base = torch.arange(12.0).reshape(3, 4)
    for tensor in (base.T, base[:, 1], base[::2], torch.nn.Parameter(base), base.expand(2, 3, 4)):
        payload = {"t": tensor}
        got = unpack(pack(Frame("update", payload)), schemas_of(payload)).payload["t"]
        assert torch.equal(got, tensor) and got.is_contiguous() and not got.requires_grad


def test_what_was_unpacked_is_its_own_memory():
    payload = {"a": torch.arange(4.0), "b": torch.arange(3)}
    data = pack(Frame("update", payload))
    first, second = (unpack(data, schemas_of(payload)).payload for _ in range(2))
    first["a"].zero_(), first["b"].zero_()
    assert torch.equal(second["a"], payload["a"]) and torch.equal(second["b"], payload["b"])
    assert data == pack(Frame("update", payload))


# --------------------------------------------------------------------------------------------- damaged messages

SMALL = {"q": torch.tensor([-1, 5], dtype=torch.int8), "s": torch.tensor(0.5)}
MESSAGE = pack(Frame("update", SMALL, round=3, client=4, generation=2, durable=1))
INTRODUCTION = pack_schema(Schema.of(SMALL), round=3)
READERS = {"message": (MESSAGE, lambda data: unpack(data, schemas_of(SMALL))), "schema": (INTRODUCTION, unpack_schema)}


@pytest.mark.parametrize("reader", READERS)
def test_every_changed_byte_is_noticed(reader):
    good, read = READERS[reader]
    read(good)
    for place, value in itertools.product(range(len(good)), range(1, 256)):
        bad = bytearray(good)
        bad[place] ^= value
        with pytest.raises(WireError):
            read(bytes(bad))


@pytest.mark.parametrize("reader", READERS)
def test_every_cut_and_every_tail_is_noticed(reader):
    good, read = READERS[reader]
    cuts = [good[:n] for n in range(len(good))] + [good[n:] for n in range(1, len(good))]
    tails = [good + tail for tail in (b"\0", b"\0" * 4, b"x" * 100, good)] + [b"\0" + good]
    for bad in cuts + tails:
        with pytest.raises(WireError):
            read(bad)


@quick
@given(st.binary(max_size=80))
def test_other_bytes_are_no_message(data):
    for bad in (data, b"tc\x02\x03" + data, b"tc\x02\x00" + data):
        with pytest.raises(WireError):
            unpack(bad, schemas_of(SMALL, {}))
        with pytest.raises(WireError):
            unpack_schema(bad)


GOOD = {"schema": Schema.of(SMALL).id}
BODY = raw(SMALL["q"]) + raw(SMALL["s"])
FORGED = {
    "magic": (seal(BODY, magic=b"TC", **GOOD), "not a message of taciturn: it starts with b'TC'"),
    "older version": (seal(BODY, version=1, **GOOD), "format version 1; this is version 2: update the older side"),
    "newer version": (seal(BODY, version=3, **GOOD), "format version 3; this is version 2: update the older side"),
    "kind": (seal(BODY, kind=len(KINDS), **GOOD), f"a message of kind {len(KINDS)}; kinds are 0 to {len(KINDS) - 1}"),
    "schema as message": (INTRODUCTION, "a schema where a message was expected"),
    "unknown schema": (seal(BODY, schema=GOOD["schema"] ^ 1), "which was not introduced"),
    "no body": (seal(**GOOD), "a body of 0 bytes; its schema has 6"),
    "short body": (seal(BODY[:-1], **GOOD), "a body of 5 bytes; its schema has 6"),
    "trailing bytes": (seal(BODY + b"\0", **GOOD), "a body of 7 bytes; its schema has 6"),
    "empty": (b"", "a message of 0 bytes; a header alone has 28"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_messages_with_good_checksums(name):
    data, message = FORGED[name]
    assert unpack(seal(BODY, **GOOD), schemas_of(SMALL)).payload["s"] == 0.5
    with pytest.raises(WireError, match=message.replace("(", r"\(")):
        unpack(data, schemas_of(SMALL))


def test_forged_schema_messages():
    text = Schema.of(SMALL).text
    right = zlib.crc32(text)
    assert unpack_schema(seal(text, kind=0, schema=right)) == Schema.of(SMALL)
    for bad in (
        seal(text, kind=1, schema=right), seal(text, kind=0, schema=right, version=1), seal(text, kind=0, schema=right + 1),
        seal(text, kind=0, schema=right, magic=b"ct"), MESSAGE,
    ):  # fmt: skip
        with pytest.raises(WireError):
            unpack_schema(bad)


def test_counters_must_fit():
    top = Frame("model", {}, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    assert unpack(pack(top), schemas_of({})) == top
    for place, value in itertools.product(range(4), (-1, 2**32)):
        counters = [0] * 4
        counters[place] = value
        with pytest.raises(WireError, match="must fit 32 bits"):
            pack(Frame("model", {}, *counters))
    with pytest.raises(WireError, match="must fit 32 bits"):
        pack_schema(Schema(()), round=-1)


def test_what_cannot_be_packed():
    with pytest.raises(WireError, match="kind 'gossip'; kinds are schema, setup, model"):
        pack(Frame("gossip", {}))
    with pytest.raises(WireError, match="payload 'z' has dtype complex64; the format carries float64"):
        pack(Frame("update", {"z": torch.zeros(2, dtype=torch.complex64)}))


# ------------------------------------------------------------------------------------------------------ schemas


@quick
@given(payloads)
def test_a_schema_survives_its_message(payload):
    schema = Schema.of(payload)
    back = unpack_schema(pack_schema(schema))
    assert back == schema == Schema.parse(schema.text)
    assert (back.id, back.dense) == (schema.id, schema.dense)
    assert schema.id == zlib.crc32(schema.text)


def test_schemas_that_differ_have_other_ids():
    a, b = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    different = [{}, {"a": a}, {"b": a}, {"a": b}, {"a": a[:1]}, {"a": a.view(2, 1)}, {"a": a, "b": a}]
    assert len({Schema.of(payload).id for payload in different}) == len(different)
    assert Schema.of({"a": a, "b": b}) == Schema.of({"b": b, "a": a}), "the order of a dict is not content"


def forbid_allocation(monkeypatch):
    for module, maker in itertools.product((np, torch), ("empty", "zeros")):
        monkeypatch.setattr(module, maker, None)


def field(shape, dtype="float32", name="a") -> bytes:
    return json.dumps([[name, dtype, shape]]).encode()


ABSURD = {
    "huge": field([2**40]), "huge product": field([2**20, 2**20]), "product beyond 64 bits": field([2**40] * 3),
    "wraps to zero": field([2**32, 2**32]), "one too large": field([2**40 + 1], "bool"), "googol": field([10**100]),
    "too long to print": b'[["a","int8",[' + b"9" * 5000 + b"]]]", "many dimensions": field([2**40] * 20_000),
    "sum": json.dumps([[f"n{i}", "float32", [2**30]] for i in range(257)]).encode(),
    "negative": field([-1]), "negative pair": field([-2, -2]), "bool": field([True]), "float": field([2.0]),
    "nan": b'[["a","float32",[NaN]]]', "infinite": b'[["a","float32",[Infinity]]]', "null": field([None]),
    "text": field(["2"]), "nested": field([[2]]), "deep": b'[["a","float32",' + b"[" * 800 + b"]" * 800 + b"]]",
    "deeper": b"[" * 200_000, "no shape": field(None), "number as shape": field(3), "letters as shape": field("ab"),
    "dtype": field([2], "float31"), "dtype list": field([2], ["float32"]), "dtype null": field([2], None),
    "dtype attribute": field([2], "nn"), "name": field([2], name=3), "name list": field([2], name=["a"]),
    "two fields": b'[["a","float32"]]', "four fields": b'[["a","float32",[],0]]', "number": b"5", "null all": b"null",
    "rows of numbers": b"[1,2,3]", "object": b'{"abc":1}', "twice": b'[["a","int8",[1]],["a","int8",[1]]]',
    "twice, other dtype": b'[["a","int8",[1]],["a","bool",[2]]]', "not JSON": b"hello", "empty": b"",
    "cut": Schema.of(SMALL).text[:-1], "two documents": b"[][]", "not ASCII": '[["ä","int8",[1]]]'.encode(),
    "invalid UTF-8": b'[["\xff","int8",[1]]]', "pickle": b"\x80\x04N.",
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_schemas_are_refused_before_anything_is_allocated(name, monkeypatch):
    text = ABSURD[name]
    message = seal(text, kind=0, schema=zlib.crc32(text))
    forbid_allocation(monkeypatch)
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as failure:
            unpack_schema(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 + 40 * len(text) and len(str(failure.value)) < 1000


def test_a_large_schema_costs_nothing_until_its_body_is_there(monkeypatch):
    """The largest schema that is accepted claims 2^40 bytes; a message without them is refused, and so is a larger one."""
    schema = Schema.parse(field([2**38]))
    assert schema.dense == 2**40
    message = seal(b"x" * 8, schema=schema.id)
    forbid_allocation(monkeypatch)
    with pytest.raises(WireError, match=f"a body of 8 bytes; its schema has {2**40}"):
        unpack(message, {schema.id: schema}, largest=2**40)
    with pytest.raises(WireError, match=f"tensors of {2**40} bytes; at most {LARGEST} are rebuilt here"):
        unpack(message, {schema.id: schema})


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(list(DTYPES))),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=12,
)
rows = st.tuples(st.text(max_size=2) | json_values, st.sampled_from(list(DTYPES)) | json_values, json_values)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=30), st.one_of(st.lists(rows, max_size=3), json_values).map(lambda v: json.dumps(v).encode())
    )
)
def test_a_text_is_a_schema_or_an_error(text):
    try:
        schema = Schema.parse(text)
    except WireError:
        return
    assert Schema.parse(schema.text) == schema and 0 <= schema.dense <= 2**40
    assert len({name for name, _, _ in schema.fields}) == len(schema.fields)
    assert all(dtype in DTYPES and all(type(n) is int and n >= 0 for n in shape) for _, dtype, shape in schema.fields)
