"""What crosses between the server and a site: letters, and the line that carries them. Nothing here knows what carries it.

A letter is for one client: packed frames (wire/format.py), which are what the ledger accounts, and an order, a few numbers
and names in JSON around them, which belongs to the envelope. A server and its sites read each other's letters if they have
the same `EDITION`; nothing of a letter is evaluated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from taciturn.core.errors import DataError, TaciturnError, WireError
from taciturn.core.types import Split
from taciturn.wire.format import KINDS, LARGEST, VERSION, Frame, Schema, pack_schema, unpack, unpack_schema

EDITION = 1000 * VERSION + 1  # of orders, and of the frames in the letters
COMMANDS = ("hello", "observe", "collect", "measure")
IDENTITY = ("run", "session", "number")  # of an exchange; a reply repeats them


@dataclass(frozen=True)
class Letter:
    """order: what to do, or how it went; frames: the bytes that count."""

    client: int
    order: dict[str, Any]
    frames: tuple[bytes, ...] = ()

    @property
    def identity(self) -> tuple[Any, ...]:
        """Of the exchange that the letter belongs to."""
        return tuple(self.order.get(name) for name in IDENTITY)

    @property
    def size(self) -> int:
        """Bytes that count."""
        return sum(map(len, self.frames))

    def reply(self, frames: Sequence[bytes] = (), **facts: Any) -> Letter:
        """The answer to this letter."""
        order = {name: self.order.get(name) for name in IDENTITY} | {"edition": EDITION}
        return Letter(self.client, order | facts, tuple(frames))


def failed(letter: Letter, error: Exception) -> Letter:
    """The answer to a letter that could not be done. What the user's model or data say may be data: it stays on the console
    of the site, and the server is told the kind of the error; other errors of this library are told as they are.
    """
    if isinstance(error, TaciturnError) and not isinstance(error, DataError):
        return letter.reply(error=str(error))
    kind = type(error).__name__
    print(f"taciturn: client {letter.client}: {kind}: {error}", file=sys.stderr, flush=True)
    return letter.reply(error=f"{kind}; what it says is on the console of the site")


class Line(Protocol):
    """Carries letters to the sites and their answers back."""

    def there(self) -> Iterable[int]:
        """Clients whose site can be reached now."""
        ...

    def place(self, client: int) -> int:
        """Where a client lives; the clients of one place work one after the other."""
        ...

    def exchange(self, letters: Sequence[Letter], seconds: float) -> Iterable[Letter]:
        """Deliver each letter once -> the answers that came within so many seconds, in any order."""
        ...


def order_text(order: dict[str, Any]) -> str:
    """An order as JSON."""
    return json.dumps(order, separators=(",", ":"), allow_nan=False)


def order_of(text: str) -> dict[str, Any]:
    """The inverse of `order_text`. Errors: `WireError`."""
    try:
        order = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not an order: {error}") from error
    if not isinstance(order, dict):
        raise WireError("not an order: a JSON object is expected")
    return order


def read(frames: Iterable[bytes], schemas: dict[int, Schema], largest: int) -> Iterator[Frame]:
    """Frames -> messages; schemas among them are learnt. largest: bytes that a message may have once rebuilt.

    Errors: `WireError` for bytes that are no frames, or larger than that.
    """
    for data in frames:
        if data[3:4] == bytes([KINDS.index("schema")]):
            schema = unpack_schema(data)
            if schema.dense > largest:
                raise WireError(f"a schema of {schema.dense} bytes; at most {largest} are expected here")
            schemas[schema.id] = schema
        else:
            yield unpack(data, schemas, largest)


def most(split: Split) -> int:
    """Bytes of the largest message that may be rebuilt: no payload of a codec has more than 64 for a value."""
    return LARGEST + 64 * (split.layout.d + split.base.d)


def introduced(frame: bytes, schema: Schema, met: Iterable[str], stage: str) -> tuple[bytes, ...]:
    """A client's frame, behind that of its schema if the server has not met it: `met` are names of post.py."""
    return (frame,) if f"up-{stage}-{schema.id}" in met else (pack_schema(schema), frame)
