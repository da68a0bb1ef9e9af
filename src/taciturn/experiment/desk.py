"""A node's resident process: it has the experiment loaded, so that a letter does not wait for torch to be imported.

Flower starts a new process for every message. The client's file of a bundle (deployed.py) imports nothing but flwr and
hands its letters on to this process, over a Unix socket in the node's state-dir (`desk`, in a folder of the owner's only);
where none listens it does the work itself. One message each way: 8 bytes of length, JSON, and the frames in a row.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from taciturn.core.errors import RunError, WireError
from taciturn.engines.letters import Letter

NAME = "desk"
_LENGTH = struct.Struct("<Q")
_MOST = 1 << 26  # bytes of the JSON
Answer = Callable[[dict[str, Any], Letter], Letter]  # what the client's file said of bundle and node; letter


@contextmanager
def _place(folder: Path) -> Any:
    """The socket's name, short enough whatever the folder's is."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{number}/{NAME}"
    finally:
        os.close(number)


def serve(folder: Path, answer: Answer) -> None:
    """Answer letters until the process is ended, one message after the other. Errors: `RunError`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.chmod(folder, 0o700)
        with socket.socket(socket.AF_UNIX) as door, _place(folder) as name:
            with suppress(FileNotFoundError):
                os.unlink(name)
            door.bind(name)
            door.listen()
            while True:
                line, _ = door.accept()
                with line, suppress(OSError, WireError):
                    told, letters = _receive(line)
                    _send(line, {}, [answer(told, letter) for letter in letters])
    except OSError as error:
        raise RunError(f"cannot listen in {folder}: {error.strerror}") from error


def _send(line: socket.socket, told: dict[str, Any], letters: list[Letter]) -> None:
    rows = [[letter.client, letter.order, [len(frame) for frame in letter.frames]] for letter in letters]
    text = json.dumps([told, rows]).encode()
    line.sendall(_LENGTH.pack(len(text)) + text)
    for letter in letters:
        for frame in letter.frames:
            line.sendall(frame)


def _receive(line: socket.socket) -> tuple[dict[str, Any], list[Letter]]:
    (size,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    if size > _MOST:
        raise WireError(f"a message of {size} bytes of JSON; at most {_MOST}")
    told, rows = json.loads(_exactly(line, size))
    return told, [Letter(int(i), order, tuple(_exactly(line, n) for n in sizes)) for i, order, sizes in rows]


def _exactly(line: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = line.recv(min(size, 1 << 20))
        if not part:
            raise WireError("the line was cut")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
