"""Messages that are almost right, for the reader of the wire format: all but a `WireError` or a valid frame is a crash.

Two engines. "structured": a valid message (or schema) with one to three fields changed (header, control fields, bytes of
the body, cuts, tails, other bodies, absurd shapes), nine of ten with a checksum that fits again. "guided": libFuzzer by
way of atheris looks for bytes that reach new lines; it gets control fields and body, and the checksum is made to fit.
Units: seconds of one input and of all; MiB = 2^20 bytes (high-water mark of the process; growth: since the first thousand
inputs); line coverage of the decoder, with kernels in C and without, measured on a sample of the structured inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common import finish
from taciturn.core import payload as payload_room
from taciturn.core.errors import WireError
from taciturn.core.kernel import without_library
from taciturn.core.types import Payload
from taciturn.wire import entropy, fields, format, lossless, packing
from taciturn.wire.format import FRAME, Frame, Schema, pack, pack_schema, unpack, unpack_schema

INPUTS = 1_400_000  # of the structured engine in a full run; the guided one runs as long
LARGEST = 1 << 20  # bytes of tensors that the reader here is told to expect; the payloads below have at most 2^16
MESSAGES = 400
HANG = 1.0  # seconds
SHAPES = ((), (300,), (4300,), (7,), (0,), (12, 5), (3, 2, 4), (1, 9))
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# what reads bytes of others; the rest of these files writes
DECODER: tuple[Any, ...] = (
    unpack, unpack_schema, format._read, format._read_controls, format._coder, format._naming, Schema.parse, Schema.dense,
    Schema.controls, Schema.data, Schema._all, fields.Field.of, fields.Field.sent, fields.plan, fields._selection,
    fields.receive, fields.tensor_of, packing.unpack_symbols, packing._split, packing.unpack_numbers, packing.require_width,
    packing.spread, packing._blocks, packing.chosen, packing.symbol_bytes, packing.number_bytes, packing.byte_group,
    lossless.load, lossless.decode, lossless._grouped, lossless._from_byte_groups, lossless._decompress,
    lossless._from_planes, lossless.Lane.stored, lossless.Lane.bytes, entropy.read_plane, entropy._parse_table,
    entropy._decode, entropy._decode_slowly, payload_room.check, payload_room._check_governed, payload_room.governed,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------ valid payloads


def noise(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Any bits; every second time few different ones, so that there is something to compress."""
    kind = getattr(torch, dtype)
    raw = rng.integers(0, 256 if rng.random() < 0.5 else 2, int(np.prod(shape)) * kind.itemsize, dtype=np.uint8)
    flat = torch.from_numpy(raw % 2 if dtype == "bool" else raw).view(kind) if len(raw) else torch.empty(0, dtype=kind)
    return flat.reshape(shape)


def symbols(rng: np.random.Generator, q: int, shape: tuple[int, ...]) -> Tensor:
    """Codes with the middle symbol more often than others, as quantized vectors have."""
    drawn = rng.normal(q / 2, rng.choice([q / 16, q / 4]), shape)
    return torch.from_numpy(np.asarray(np.clip(drawn, 0, q - 1), np.uint8))


def valid_payload(rng: np.random.Generator, most: int = 300) -> Payload:
    """One to three data fields of any dtype, each with control fields or without, and a marker every third time."""
    payload: Payload = {}
    for number in range(rng.integers(1, 4)):
        name, form = f"layer.{number}/x", rng.choice(["radix", "width", "plain"])
        shape = tuple(int(n) for n in SHAPES[rng.integers(len(SHAPES))])
        if rng.random() < 0.5:
            shape = (int(rng.integers(0, most)),)
        if form == "radix":
            q = int(rng.choice([1, 2, 3, 4, 7, 15, 16, 31, 127, 255, 256, rng.integers(1, 257)]))
            payload |= {name: symbols(rng, q, shape), f"{name}.radix": torch.tensor(q - 1, dtype=torch.uint8)}
        elif form == "width":
            dtype = str(rng.choice(["int16", "int32", "int64"]))
            width = int(rng.integers(0, payload_room.WIDEST[dtype] + 1))
            values = torch.from_numpy(np.asarray(rng.integers(0, 1 << width, shape)).astype(dtype))
            payload |= {name: values, f"{name}.width": torch.tensor(width, dtype=torch.uint8)}
        else:
            payload[name] = noise(rng, str(rng.choice(DTYPES)), shape)
        if shape and rng.random() < 0.4:
            payload[f"{name}.count"] = torch.tensor(int(rng.integers(0, shape[0] + 1)), dtype=torch.int32)
        if rng.random() < 0.4:
            axes = int(rng.integers(0, len(shape) + 1))
            payload[f"{name}.mask"] = torch.from_numpy(np.asarray(rng.random(shape[:axes]) < 0.5))
    if rng.random() < 0.4:
        payload["lossless"] = torch.tensor(int(rng.integers(0, 3)), dtype=torch.uint8)
    return payload


def canonical(payload: Payload) -> Payload:
    """What arrives: zeros where nothing traveled. The marker says how a message was packed, so it is left out."""
    arrived = {}
    for name, tensor in sorted(payload.items()):
        kept = torch.ones(tensor.shape, dtype=torch.bool)
        if f"{name}.count" in payload:
            kept[int(payload[f"{name}.count"]) :] = False
        if f"{name}.mask" in payload:
            mask = payload[f"{name}.mask"]
            kept &= mask.reshape((*mask.shape, *[1] * (tensor.dim() - mask.dim())))
        if name != payload_room.LOSSLESS:
            arrived[name] = torch.where(kept, tensor, torch.zeros_like(tensor))
    return arrived


# ------------------------------------------------------------------------------------------------------ changed messages


def sealed(head: bytes, body: bytes) -> bytes:
    """24 bytes of header and a body, with a checksum that fits."""
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


@dataclass
class Fuzzer:
    """Valid messages of many schemas, and changes of them."""

    seed: int = 0
    schemas: dict[int, Schema] = field(default_factory=dict)
    messages: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.chance = random.Random(self.seed)
        for _ in range(MESSAGES):
            payload = valid_payload(rng)
            schema = Schema.of(payload)
            self.schemas[schema.id] = schema
            self.messages.append(pack(Frame("update", payload, 3, 4, 2, 1)))
        self.known = list(self.schemas)
        self.introductions = [pack_schema(schema) for schema in self.schemas.values()]

    def inputs(self) -> Iterator[tuple[str, bytes]]:
        """What is read, and the bytes: without end."""
        while True:
            if self.chance.random() < 0.15:
                yield "schema", self.schema()
            else:
                yield "message", self.message()

    def message(self) -> bytes:
        """A valid message with one to three changes."""
        data = bytearray(self.chance.choice(self.messages))
        head, body = data[: FRAME - 4], data[FRAME:]
        for _ in range(self.chance.randint(1, 3)):
            change = self.chance.choice(CHANGES)
            change(self, head, body)
        if self.chance.random() < 0.1:
            return bytes(data[:FRAME] + body)[: self.chance.randint(0, len(data))]
        return sealed(bytes(head), bytes(body))

    def schema(self) -> bytes:
        """A schema's introduction, its text changed."""
        data = self.chance.choice(self.introductions)
        head, text = bytearray(data[: FRAME - 4]), bytearray(data[FRAME:])
        if self.chance.random() < 0.7:
            rows = json.loads(bytes(text))
            for _ in range(self.chance.randint(1, 3)):
                self._change_row(rows)
            text = bytearray(json.dumps(rows, separators=(",", ":")).encode())
        else:
            for _ in range(self.chance.randint(1, 3)):
                _body_byte(self, head, text)
        head[4:8] = struct.pack("<I", zlib.crc32(text))
        if self.chance.random() < 0.1:
            _header(self, head, text)
        return sealed(bytes(head), bytes(text))

    def _change_row(self, rows: list[Any]) -> None:
        chance = self.chance
        if not rows or chance.random() < 0.1:
            rows.append(
                chance.choice([rows[0] if rows else [], ["lossless", "uint8", []], 3, None, ["x", "bool", [2**38]]])
            )
            return
        row = chance.choice(rows)
        if not isinstance(row, list) or len(row) != 3:
            return
        absurd = [-1, 0, 1, 2, 3, 255, 2**20, 2**31, 2**32, 2**40, 2**40 + 1, 2**63, 2**64, 10**30, True, None, 1.5, "3"]
        place = chance.randrange(3)
        if place == 2 and isinstance(row[2], list):
            at = chance.randint(0, len(row[2]))
            row[2][at : at + chance.randint(0, 1)] = [chance.choice(absurd)] * chance.choice([0, 1, 1, 2, 70])
        elif place == 1:
            row[1] = chance.choice([*DTYPES, "complex64", "", None, 5, []])
        else:
            other = chance.choice(rows)
            name = other[0] if isinstance(other, list) and other else "x"
            row[0] = f"{name}.{chance.choice(['radix', 'width', 'count', 'mask', 'x'])}" if chance.random() < 0.8 else None


def _header(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    chance = fuzzer.chance
    at = chance.choice([0, 1, 2, 3, 3, 4, 8, 12, 16, 20])
    if at == 4:
        head[4:8] = struct.pack("<I", chance.choice(fuzzer.known))
    else:
        head[at] = chance.choice([0, 1, 2, 3, 5, 6, 255, chance.randrange(256)])


def _controls(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    """The first bytes of the body are control fields, or tables of frequencies soon after."""
    if body:
        at = min(int(fuzzer.chance.expovariate(0.2)), len(body) - 1)
        body[at] = fuzzer.chance.choice([0, 1, 2, 3, 14, 15, 62, 63, 64, 127, 128, 254, 255, fuzzer.chance.randrange(256)])


def _body_byte(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    if body:
        at = fuzzer.chance.randrange(len(body))
        body[at] = fuzzer.chance.choice(
            [0, 255, body[at] ^ (1 << fuzzer.chance.randrange(8)), fuzzer.chance.randrange(256)]
        )


def _last_byte(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    if body:
        body[-1] ^= 1 << fuzzer.chance.randrange(8)


def _cut(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    at = fuzzer.chance.randint(0, len(body))
    del body[at : at + fuzzer.chance.choice([1, 1, 2, 8, len(body)])]


def _tail(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    body += bytes(fuzzer.chance.choices([0, 1, 255, 40], k=fuzzer.chance.choice([1, 1, 4, 50])))


def _other_body(fuzzer: Fuzzer, head: bytearray, body: bytearray) -> None:
    body[:] = fuzzer.chance.choice(fuzzer.messages)[FRAME:]


Change = Callable[[Fuzzer, bytearray, bytearray], None]
CHANGES: tuple[Change, ...] = (
    *[_controls] * 6, *[_body_byte] * 6, *[_last_byte] * 2, _header, *[_cut] * 2, _tail, _other_body,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- running


def read(what: str, data: bytes, schemas: dict[int, Schema]) -> str:
    """One input -> what came of it: "valid", "refused", or the crash in words."""
    try:
        if what == "message":
            unpack(data, schemas, LARGEST)
            return "valid"
        schema = unpack_schema(data)
        body = bytes(min(64, sum(one.sent for one in schema.controls)))  # a message of it: no bytes of data, all at zero
        head = data[:3] + b"\x03" + struct.pack("<I", schema.id) + bytes(16)
        unpack(sealed(head, body), {schema.id: schema}, LARGEST)
        return "valid"
    except WireError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error} in {what} {data.hex()}"


def peak() -> float:
    """High-water mark of the process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def structured(inputs: int | None, seconds: float | None, seed: int = 0) -> dict[str, Any]:
    """So many inputs, or for so long."""
    fuzzer, seen, slowest, before = Fuzzer(seed), Counter(), 0.0, 0.0
    crashes: list[str] = []
    began, done = time.perf_counter(), 0
    for what, data in fuzzer.inputs():
        native = done % 4 < 3  # every fourth without the kernels in C
        with nullcontext() if native else without_library():
            start = time.perf_counter()
            found = read(what, data, fuzzer.schemas)
            slowest = max(slowest, time.perf_counter() - start)
        seen[found if found in ("valid", "refused") else "crash"] += 1
        if found not in ("valid", "refused"):
            crashes.append(found)
        done += 1
        if done == 1000:
            before = peak()
        if done == inputs or (seconds and not done % 64 and time.perf_counter() - began > seconds):
            break
    took = time.perf_counter() - began
    return {
        "inputs": done, "seconds": took, "valid": seen["valid"], "refused": seen["refused"], "crashes": seen["crash"],
        "slowest_input_seconds": slowest, "hangs": int(slowest > HANG), "max_rss_mib": peak(),
        "rss_growth_mib": max(0.0, peak() - before) if before else 0.0, "first_crash": crashes[0] if crashes else None,
    }  # fmt: skip


def function_of(thing: Any) -> types.FunctionType:
    """What runs of a function, method, property or context manager."""
    for name in ("__wrapped__", "func", "fget", "__func__"):
        thing = getattr(thing, name, thing)
    return thing


def lines_of(code: types.CodeType) -> set[tuple[str, int]]:
    """Lines that can run, with those of functions inside."""
    found = {(code.co_filename, line) for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found.union(*(lines_of(one) for one in code.co_consts if isinstance(one, types.CodeType)))


def coverage(inputs: int, seed: int = 1) -> tuple[float, list[str]]:
    """Share of the decoder's lines that run on a sample of structured inputs, and those that do not."""
    wanted = set().union(*(lines_of(function_of(thing).__code__) for thing in DECODER))
    files = {name for name, _ in wanted}
    hit: set[tuple[str, int]] = set()

    def local(frame: types.FrameType, event: str, _: Any) -> Any:
        hit.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    fuzzer = Fuzzer(seed)
    for done, (what, data) in enumerate(fuzzer.inputs()):
        if done >= inputs:
            break
        with nullcontext() if done % 2 else without_library():
            sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename in files else None)
            try:
                read(what, data, fuzzer.schemas)
                read("message", fuzzer.chance.choice(fuzzer.messages), fuzzer.schemas)
            finally:
                sys.settrace(None)
    missed = sorted(f"{Path(name).name}:{line}" for name, line in wanted - hit)
    return 1 - len(wanted - hit) / len(wanted), missed


# -------------------------------------------------------------------------------------------------------------- guided


def guide(folder: str, seconds: int) -> None:
    """In a process of its own, which libFuzzer ends: bytes -> (schema, control fields and body) or a schema's text."""
    import atheris

    for function in map(function_of, DECODER):
        function.__code__ = atheris.instrument_func(function).__code__
    fuzzer = Fuzzer()
    head = fuzzer.messages[0][:4]

    def once(data: bytes) -> None:
        if len(data) < 2:
            return
        number = int.from_bytes(data[:2], "little")
        if number & 1:
            text = data[2:]
            found = read("schema", sealed(head[:3] + b"\0" + struct.pack("<I", zlib.crc32(text)) + bytes(16), text), {})
        else:
            known = struct.pack("<I", fuzzer.known[(number >> 1) % len(fuzzer.known)])
            found = read("message", sealed(head + known + bytes(16), data[2:]), fuzzer.schemas)
        if found not in ("valid", "refused"):
            raise RuntimeError(found)

    seeds = Path(folder) / "seeds"
    seeds.mkdir()
    for number, data in enumerate(fuzzer.messages):
        at = fuzzer.known.index(struct.unpack_from("<I", data, 4)[0])
        (seeds / f"message-{number}").write_bytes(struct.pack("<H", at << 1) + data[FRAME:])
    for number, data in enumerate(fuzzer.introductions):
        (seeds / f"schema-{number}").write_bytes(b"\1\0" + data[FRAME:])
    options = [
        f"-max_total_time={seconds}",
        "-print_final_stats=1",
        f"-artifact_prefix={folder}/",
        "-timeout=2",
        "-max_len=2048",
    ]
    atheris.Setup([sys.argv[0], *options, str(seeds)], once)
    atheris.Fuzz()


def guided(seconds: float) -> dict[str, Any] | str:
    """What libFuzzer reports, or why it did not run."""
    if importlib.util.find_spec("atheris") is None:
        return "atheris is not installed (pip install 'taciturn[fuzz]')"
    with tempfile.TemporaryDirectory() as folder:
        code = f"from bench.fuzz_wire import guide; guide({folder!r}, {max(1, round(seconds))})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        crashes = sorted(Path(folder).glob("*-*"))
        text = run.stderr + run.stdout
        stats = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", text)}
        reached = [int(n) for n in re.findall(r"\bcov: (\d+)", text)]
        if "number_of_executed_units" not in stats:
            return f"atheris did not run: {text[-500:]}"
        crash = re.search(r"RuntimeError: (.*)", text)
        return {
            "inputs": stats["number_of_executed_units"], "seconds": seconds, "crashes": len(crashes),
            "max_rss_mib": float(stats["peak_rss_mb"]), "edges": max(reached, default=0),
            "edges_of_seeds": min(reached, default=0), "first_crash": crash.group(1)[:2000] if crash else None,
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten seconds, same code and keys")
    parser.add_argument("--seconds", type=float, help="for so long, both engines together; keeps no result file")
    options = parser.parse_args()
    seconds = options.seconds or (10.0 if options.quick else None)
    have = importlib.util.find_spec("atheris") is not None
    sample = 4000 if seconds else 40_000
    ours = structured(None if seconds else INPUTS, seconds and (seconds / 2 if have else seconds))
    theirs = guided(seconds / 2 if seconds else ours["seconds"])
    covered, missed = coverage(sample)
    both = [ours] if isinstance(theirs, str) else [ours, theirs]
    table = Table("", "structured", "guided")
    for name in (
        "inputs",
        "seconds",
        "valid",
        "refused",
        "crashes",
        "slowest_input_seconds",
        "max_rss_mib",
        "rss_growth_mib",
    ):
        cells = [one.get(name, "") for one in both]
        table.add_row(
            name, *(f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if cell != "" else "" for cell in cells)
        )
    table.add_row("line coverage of the decoder", f"{covered:.1%}", "" if len(both) == 1 else f"{both[1]['edges']} edges")
    Console(width=100).print(table)
    print("lines not reached:", ", ".join(missed) or "none")
    if isinstance(theirs, str):
        print("guided: null,", theirs)
    figures = {name: sum(one[name] for one in both) for name in ("inputs", "crashes")} | {
        "max_rss_mib": max(one["max_rss_mib"] for one in both),
        "rss_growth_mib": ours["rss_growth_mib"],
        "line_coverage_decoder": covered,
        "coverage_inputs": sample,
        "slowest_input_seconds": ours["slowest_input_seconds"],
        "structured": ours,
        "guided": None if isinstance(theirs, str) else theirs,
        "guided_reason": theirs if isinstance(theirs, str) else None,
    }
    finish("fuzz_wire", figures, quick=seconds is not None)


if __name__ == "__main__":
    main()
