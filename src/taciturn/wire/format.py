"""The bytes of a message: versioned, self-describing, checksummed, never pickled.

A frame is a header of 28 bytes and a body. The header, little-endian:

    offset  size  field
    0       2     magic "tc"
    2       1     version (2)
    3       1     kind (KINDS)
    4       4     schema: CRC-32 of the schema's text
    8       4     round
    12      4     client
    16      4     generation: the client state that the receiver is to start from (down) or has written (up)
    20      4     durable: the newest generation that is in a checkpoint on disk
    24      4     CRC-32 of the first 24 bytes and the body

The body is the control fields of the payload (core/payload.py), then its data fields, each part in the order of the names,
little-endian and without padding. Data fields are selected and packed as their control fields say (packing.py), booleans
are bits, and under the marker "lossless" the data fields are one coded string (lossless.py), if that is shorter.
A schema is a JSON list of [name, dtype, shape] of all fields; it is itself sent as a frame (kind "schema"), once a run and
direction, so that a frame's overhead stays at 28 bytes. Schema and control fields say the length of a body and of all that
is rebuilt from it, so a reader checks everything before it allocates; what does not fit is a `WireError`.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from taciturn.core.errors import WireError
from taciturn.core.payload import LOSSLESS, check, nbytes
from taciturn.core.types import Payload
from taciturn.wire import lossless
from taciturn.wire.fields import DTYPES, Field, bytes_of, plan, receive, send, tensor_of
from taciturn.wire.lossless import CODERS, Lane
from taciturn.wire.packing import Raw, pack_symbols, unpack_symbols

__all__ = ["FRAME", "KINDS", "Frame", "Schema", "nbytes", "pack", "pack_schema", "packed_bytes", "unpack", "unpack_schema"]

VERSION = 2
KINDS = ("schema", "setup", "model", "update", "monitor", "evaluate", "plan")
_HEADER = struct.Struct("<2sBBIIIIII")
FRAME = _HEADER.size
LARGEST = 1 << 28  # bytes of the tensors that `unpack` rebuilds, unless it is told to expect more
_LARGEST = 1 << 40  # bytes of the tensors of any schema; a larger claim is an attack or an error
_DIMENSIONS = 64  # of a tensor; the product of more could take the reader minutes
assert sys.byteorder == "little", "taciturn's wire format is written for little-endian machines"


@dataclass(frozen=True)
class Schema:
    """Names, dtypes and shapes of a payload, in the order of the names.

    >>> import torch
    >>> Schema.of({"values": torch.zeros(3)}).text
    b'[["values","float32",[3]]]'
    """

    fields: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, payload: Payload) -> Schema:
        """The schema of a payload. Errors: `WireError` for an unknown dtype, or control fields that make no sense."""
        fields = []
        for name, tensor in sorted(payload.items()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise WireError(f"payload {name!r} has dtype {dtype}; the format carries {', '.join(DTYPES)}")
            fields.append((name, dtype, tuple(tensor.shape)))
        return _known(tuple(fields))

    @classmethod
    def parse(cls, text: bytes) -> Schema:
        """The schema of a text. Errors: `WireError`."""
        try:
            rows = json.loads(text.decode("ascii"))
            fields = tuple((name, dtype, tuple(shape)) for name, dtype, shape in rows)
        except (ValueError, TypeError, RecursionError) as error:
            raise WireError(f"not a schema: {error}") from error
        for name, dtype, shape in fields:
            good = isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES and len(shape) <= _DIMENSIONS
            good = good and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _LARGEST for n in shape)
            if not good or math.prod(max(1, n) for n in shape) > _LARGEST:
                raise WireError(f"not a schema: field {(name, dtype, shape)!r:.200}")
        schema = cls(fields)
        if len({name for name, _, _ in fields}) != len(fields):
            raise WireError("not a schema: a name stands twice")
        if schema.dense > _LARGEST:
            raise WireError(f"a schema of {schema.dense} bytes; at most {_LARGEST} are accepted")
        check({name: (dtype, shape) for name, dtype, shape in fields})
        return schema

    @cached_property
    def text(self) -> bytes:
        """The JSON that is sent."""
        return json.dumps(self.fields, separators=(",", ":")).encode("ascii")

    @cached_property
    def id(self) -> int:
        """CRC-32 of the text."""
        return zlib.crc32(self.text)

    @cached_property
    def dense(self) -> int:
        """Bytes of the tensors that stand in memory; control fields decide how many of them travel."""
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in self.fields)

    @cached_property
    def controls(self) -> tuple[Field, ...]:
        """The fields that say what travels, in the order of the body."""
        return tuple(one for one in self._all if one.control)

    @cached_property
    def data(self) -> tuple[Field, ...]:
        """All other fields."""
        return tuple(one for one in self._all if not one.control)

    @cached_property
    def _all(self) -> tuple[Field, ...]:
        return tuple(Field.of(*field) for field in sorted(self.fields))


@lru_cache(maxsize=256)
def _known(fields: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Schema:
    """One object a schema: it is checked, and its text and number are made, once."""
    check({name: (dtype, shape) for name, dtype, shape in fields})
    return Schema(fields)


@dataclass(frozen=True)
class Frame:
    """A message: header fields and payload."""

    kind: str
    payload: Payload
    round: int = 0
    client: int = 0
    generation: int = 0
    durable: int = 0


# ------------------------------------------------------------------------------------------------------------ packing


def _seal(frame: Frame, schema_id: int, parts: Sequence[Any]) -> bytes:
    if frame.kind not in KINDS:
        raise WireError(f"a message of kind {frame.kind!r}; kinds are {', '.join(KINDS)}")
    counters = (frame.round, frame.client, frame.generation, frame.durable)
    if not all(0 <= value < 1 << 32 for value in counters):
        raise WireError(f"round, client and generations must fit 32 bits; got {counters}")
    head = _HEADER.pack(b"tc", VERSION, KINDS.index(frame.kind), schema_id, *counters, 0)[:-4]
    checksum = zlib.crc32(head)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join([head, struct.pack("<I", checksum), *parts])


def pack(frame: Frame) -> bytes:
    """A message as bytes: FRAME + nbytes(payload) of them, or fewer with the marker "lossless".

    Errors: `WireError` for a kind, counter, dtype, control field or value that the format does not carry.
    """
    schema = Schema.of(frame.payload)
    return _seal(frame, schema.id, _body(schema, frame.payload))


def packed_bytes(payload: Payload) -> int:
    """Bytes of the packed body of one payload, by packing it; `nbytes` knows them without, if nothing is compressed."""
    return sum(map(len, _body(Schema.of(payload), payload)))


def _body(schema: Schema, payload: Payload) -> list[Raw]:
    controls = {field.name: bytes_of(payload[field.name]) for field in schema.controls}
    lanes: list[tuple[Lane, Raw]] = []
    stored: list[Raw] = []
    for field in schema.data:
        with _naming(field):
            lanes.append(send(field, controls, bytes_of(payload[field.name])))
            stored.append(lossless.store(*lanes[-1]))
    coded = None
    if LOSSLESS in controls:
        coder = _coder(controls)
        coded = lossless.encode(coder, lanes, sum(map(len, stored))) if coder else None
        controls[LOSSLESS] = np.array([0 if coded is None else coder], np.uint8)
    first = [pack_symbols(controls[f.name], 2) if f.dtype == "bool" else controls[f.name] for f in schema.controls]
    return [*first, *(stored if coded is None else [np.frombuffer(coded, np.uint8)])]


def _coder(controls: Mapping[str, Raw]) -> int:
    """The coder that the marker names, 0 if there is none."""
    coder = int(controls[LOSSLESS][0]) if LOSSLESS in controls else 0
    if coder >= len(CODERS):
        raise WireError(f"payload {LOSSLESS!r} asks for coder {coder}; coders are 0 to {len(CODERS) - 1}")
    return coder


@contextmanager
def _naming(field: Field) -> Iterator[None]:
    """An error inside is an error of this field."""
    try:
        yield
    except WireError as error:
        raise WireError(f"payload {field.name!r}: {error}") from error


def pack_schema(schema: Schema, round: int = 0, client: int = 0) -> bytes:
    """The frame that introduces a schema."""
    return _seal(Frame("schema", {}, round, client), schema.id, [schema.text])


# ---------------------------------------------------------------------------------------------------------- unpacking


def unpack(data: bytes, schemas: Mapping[int, Schema], largest: int = LARGEST) -> Frame:
    """Bytes -> message; `schemas` holds the schemas introduced so far, by id.

    largest: bytes of the tensors that may be rebuilt; a receiver that expects larger ones says so.
    Errors: `WireError` for bytes that are cut, flipped, of another version, of an unknown schema or kind, too long or too
    large when rebuilt, and for packed values that no writer makes.
    """
    if len(data) < FRAME:
        raise WireError(f"a message of {len(data)} bytes; a header alone has {FRAME}")
    magic, version, kind, schema_id, *counters, checksum = _HEADER.unpack_from(data)
    if magic != b"tc":
        raise WireError(f"not a message of taciturn: it starts with {magic!r}")
    if version != VERSION:
        raise WireError(f"a message of format version {version}; this is version {VERSION}: update the older side")
    if zlib.crc32(memoryview(data)[FRAME:], zlib.crc32(data[: FRAME - 4])) != checksum:
        raise WireError("the checksum does not fit: the message was cut or changed on its way")
    if kind >= len(KINDS):
        raise WireError(f"a message of kind {kind}; kinds are 0 to {len(KINDS) - 1}")
    if KINDS[kind] == "schema":
        raise WireError("a schema where a message was expected; read it with unpack_schema")
    if schema_id not in schemas:
        raise WireError(f"a message of schema {schema_id:#010x}, which was not introduced")
    schema = schemas[schema_id]
    if schema.dense > largest:
        raise WireError(f"tensors of {schema.dense} bytes; at most {largest} are rebuilt here (largest)")
    raw = np.frombuffer(data, np.uint8)[FRAME:]
    raw.flags.writeable = False  # of what arrived nothing is kept but copies
    return Frame(KINDS[kind], _read(schema, raw), *counters)


def _read(schema: Schema, raw: Raw) -> Payload:
    """A body -> payload. Nothing is allocated for data fields before all lengths fit."""
    controls, at = _read_controls(schema, raw)
    selections, lanes = [], []
    for field in schema.data:
        with _naming(field):
            selection, lane = plan(field, controls)
        selections.append(selection)
        lanes.append(lane)
    coder, sizes, rest = _coder(controls), [lane.stored for lane in lanes], raw[at:]
    if len(rest) > sum(sizes) or (len(rest) < sum(sizes)) != (coder > 0):
        raise WireError(f"a body of {len(raw)} bytes; its schema has {at + sum(sizes)}" + (" or fewer" if coder else ""))
    found = lossless.decode(coder, rest, lanes) if coder else np.split(rest, np.cumsum(sizes)[:-1])
    payload = {field.name: tensor_of(field, controls[field.name]) for field in schema.controls}
    for field, lane, selection, mine in zip(schema.data, lanes, selections, found, strict=False):
        with _naming(field):
            mine = mine if coder else lossless.load(lane, mine)
            payload[field.name] = tensor_of(field, receive(field, controls, selection, mine))
    return {name: payload[name] for name in sorted(payload)}


def _read_controls(schema: Schema, raw: Raw) -> tuple[dict[str, Raw], int]:
    """The control fields as bytes, and where they end."""
    least, at, controls = sum(field.sent for field in schema.controls), 0, {}
    if len(raw) < least:
        raise WireError(f"a body of {len(raw)} bytes; its control fields have {least}")
    for field in schema.controls:
        mine = raw[at : at + field.sent]
        at += field.sent
        with _naming(field):
            controls[field.name] = unpack_symbols(mine, field.numel, 2) if field.dtype == "bool" else mine.copy()
    return controls, at


def unpack_schema(data: bytes) -> Schema:
    """The frame of `pack_schema` -> schema. Errors: `WireError`."""
    if len(data) < FRAME or data[:3] != b"tc" + bytes([VERSION]) or data[3] != KINDS.index("schema"):
        raise WireError("not a schema message of this version")
    (schema_id,) = struct.unpack_from("<I", data, 4)
    (checksum,) = struct.unpack_from("<I", data, FRAME - 4)
    if zlib.crc32(memoryview(data)[FRAME:], zlib.crc32(data[: FRAME - 4])) != checksum or schema_id != zlib.crc32(
        data[FRAME:]
    ):
        raise WireError("the checksum of a schema does not fit")
    return Schema.parse(data[FRAME:])
