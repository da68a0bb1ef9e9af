"""The undo journal: what rows held before they were changed, so that they can be put back.

A journal is a file of batches. A batch is one append and is synced before any of its rows is changed, so that a crash
can tear the last batch only, and then none of its rows was changed. Little-endian:

    batch   magic "undo", bytes of the body (8), CRC-32 of the body (4), body
    body    for each table: its number (4), rows (8), ids [m] int64, old rows [m, w]
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from taciturn.core.errors import RunError
from taciturn.core.state import sync_folder
from taciturn.engines.rows import Ids, Raw

_MAGIC = b"undo"
_BATCH = struct.Struct("<4sQI")
_PART = struct.Struct("<IQ")
Part = tuple[int, Ids, Raw]  # number of the table, ids, their old rows


def append(path: Path, parts: Sequence[Part]) -> None:
    """One more batch, on the disk when this returns. Errors: `RunError`; the journal is then as before."""
    body = b"".join(
        piece
        for table, ids, rows in parts
        for piece in (_PART.pack(table, len(ids)), ids.astype("<i8", copy=False).tobytes(), rows.tobytes())
    )
    data = memoryview(_BATCH.pack(_MAGIC, len(body), zlib.crc32(body)) + body)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        before = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, before)
            raise
        finally:
            os.close(file)
        if not before:
            sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; the last good checkpoint is kept") from error


def read(path: Path, widths: Sequence[int], *, newest: bool) -> Iterator[list[Part]]:
    """The batches of a journal; widths: bytes of a row of each table. A torn last batch of the newest journal is left out.

    Errors: `RunError` for any other batch that is not as it was written.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        while (at := file.tell()) < size:
            head = file.read(_BATCH.size)
            magic, length, checksum = _BATCH.unpack(head) if len(head) == _BATCH.size else (b"", 0, 0)
            end = at + _BATCH.size + length
            body = file.read(length) if magic == _MAGIC and end <= size else b""
            if magic != _MAGIC or end > size or zlib.crc32(body) != checksum:
                if newest and (magic != _MAGIC or end >= size):
                    return
                raise RunError(f"{path} is damaged at byte {at}: the clients' rows cannot be put back")
            yield _parts(body, widths)


def _parts(body: bytes, widths: Sequence[int]) -> list[Part]:
    parts, at = [], 0
    while at < len(body):
        table, count = _PART.unpack_from(body, at)
        at += _PART.size
        ids = np.frombuffer(body, "<i8", count, at)
        at += ids.nbytes
        rows = np.frombuffer(body, f"V{widths[table]}", count, at)
        at += rows.nbytes
        parts.append((table, ids, rows))
    return parts
