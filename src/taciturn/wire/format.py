"""The bytes of a message: versioned, self-describing, checksummed, never pickled.

A frame is a header of 28 bytes and a body. The header, little-endian:

    offset  size  field
    0       2     magic "tc"
    2       1     version (1)
    3       1     kind (KINDS)
    4       4     schema: CRC-32 of the schema's text
    8       4     round
    12      4     client
    16      4     generation: the client state that the receiver is to start from (down) or has written (up)
    20      4     durable: the newest generation that is in a checkpoint on disk
    24      4     CRC-32 of the first 24 bytes and the body

The body is the tensors of the payload, in the order of the schema, little-endian and without padding. A schema is a JSON
list of [name, dtype, shape]; it is itself sent as a frame (kind "schema"), once a run and direction, so that a frame's
overhead stays at 28 bytes. A reader checks everything before it allocates; what does not fit is a `WireError`.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from taciturn.core.broadcast import payload_bytes
from taciturn.core.errors import WireError
from taciturn.core.types import Payload

VERSION = 1
KINDS = ("schema", "setup", "model", "update", "monitor", "evaluate")
_HEADER = struct.Struct("<2sBBIIIIII")
FRAME = _HEADER.size
_LARGEST = 1 << 40  # bytes of a body; a larger claim is an attack or an error
_DIMENSIONS = 64  # of a tensor; the product of more could take the reader minutes
_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
assert sys.byteorder == "little", "taciturn's wire format is written for little-endian machines"


def nbytes(payload: Payload) -> Tensor:
    """Bytes of the packed body of one payload: [] int64, under `torch.vmap` [m]. Equals len(pack(..)) - FRAME."""
    return torch.tensor(payload_bytes(payload), dtype=torch.int64)


@dataclass(frozen=True)
class Schema:
    """Names, dtypes and shapes of a payload, in the order of the names.

    >>> Schema.of({"values": torch.zeros(3)}).text
    b'[["values","float32",[3]]]'
    """

    fields: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, payload: Payload) -> Schema:
        """The schema of a payload. Errors: `WireError` for a dtype that the format does not know."""
        fields = []
        for name, tensor in sorted(payload.items()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise WireError(f"payload {name!r} has dtype {dtype}; the format carries {', '.join(_DTYPES)}")
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
            good = isinstance(name, str) and isinstance(dtype, str) and dtype in _DTYPES and len(shape) <= _DIMENSIONS
            if not good or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _LARGEST for n in shape):
                raise WireError(f"not a schema: field {(name, dtype, shape)!r:.200}")
        schema = cls(fields)
        if len({name for name, _, _ in fields}) != len(fields):
            raise WireError("not a schema: a name stands twice")
        if schema.nbytes > _LARGEST:
            raise WireError(f"a schema of {schema.nbytes} bytes; at most {_LARGEST} are accepted")
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
    def nbytes(self) -> int:
        """Bytes of a body of this schema."""
        return sum(math.prod(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in self.fields)


@lru_cache(maxsize=256)
def _known(fields: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Schema:
    """One object a schema: its text and number are made once."""
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


def _seal(frame: Frame, schema_id: int, body: bytes) -> bytes:
    if frame.kind not in KINDS:
        raise WireError(f"a message of kind {frame.kind!r}; kinds are {', '.join(KINDS)}")
    counters = (frame.round, frame.client, frame.generation, frame.durable)
    if not all(0 <= value < 1 << 32 for value in counters):
        raise WireError(f"round, client and generations must fit 32 bits; got {counters}")
    head = _HEADER.pack(b"tc", VERSION, KINDS.index(frame.kind), schema_id, *counters, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def pack(frame: Frame) -> bytes:
    """A message as bytes: FRAME + nbytes(payload) of them."""
    parts = []
    for _, tensor in sorted(frame.payload.items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts.append(raw.numpy().tobytes())
    return _seal(frame, Schema.of(frame.payload).id, b"".join(parts))


def pack_schema(schema: Schema, round: int = 0, client: int = 0) -> bytes:
    """The frame that introduces a schema."""
    return _seal(Frame("schema", {}, round, client), schema.id, schema.text)


def unpack(data: bytes, schemas: Mapping[int, Schema]) -> Frame:
    """Bytes -> message; `schemas` holds the schemas introduced so far, by id.

    Errors: `WireError` for bytes that are cut, flipped, of another version, of an unknown schema or kind, or too long.
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
    if len(data) - FRAME != schema.nbytes:
        raise WireError(f"a body of {len(data) - FRAME} bytes; its schema has {schema.nbytes}")
    payload, offset = {}, FRAME
    for name, dtype_name, shape in schema.fields:
        dtype, count = _DTYPES[dtype_name], math.prod(shape)
        raw = bytearray(data[offset : offset + count * dtype.itemsize])
        offset += len(raw)
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        payload[name] = flat.reshape(shape)
    return Frame(KINDS[kind], payload, *counters)


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
