"""Five ways to run the local engine.

sequential  one client after another, no client axis: the plain reading of client.py.
loopback    sequential, and each message is packed to bytes, unpacked, and nothing else reaches the other side.
stacked     a block of clients at once: layer by layer (fused.py) where all layers are known, else through `torch.vmap`,
            else one at a time; the record says which and why.
ray         stacked, and the blocks are cut over the actors of a Ray cluster (ray.py).
flower      each client works at its own site (site.py), and letters go there and back (sites.py, flower.py).
Laws: sequential = loopback in every bit and byte; stacked = sequential to rounding, and in every byte and draw; ray =
stacked with one torch thread and the same blocks, in every bit and byte; flower = loopback in every bit and byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ConfigError, require, unknown
from taciturn.core.payload import LOSSLESS, controlled, nbytes
from taciturn.core.random import Key
from taciturn.core.state import row, stack
from taciturn.core.types import Payload, Record, SyncRule
from taciturn.engines.crew import Alone, Crew, walk
from taciturn.engines.fork import workers as forked
from taciturn.engines.fused import Fused
from taciturn.engines.fused import build as fused_or_reason
from taciturn.engines.local import LocalEngine, Lose, Timed
from taciturn.engines.memory import keep_freed_memory
from taciturn.engines.plain import Plain
from taciturn.engines.post import Post
from taciturn.engines.ray import workers as actors
from taciturn.engines.sites import NEWCOMER, Sites
from taciturn.engines.store import ClientStore
from taciturn.engines.train import Trainer
from taciturn.method import Method
from taciturn.precision.policies import apart, learns, told
from taciturn.wire.format import FRAME, Frame, Schema, pack, pack_schema, packed_bytes, unpack, unpack_schema

ENGINES = ("auto", "flower", "loopback", "ray", "sequential", "stacked")
VMAP, LAYERS, SINGLE = "vmap", "layer by layer", "one client at a time"
BLOCK_VALUES = 4_000_000  # floats of the stacked models of a block
LAYER_VALUES = 64_000_000  # the same, layer by layer, where few of them are formed


def one(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The client axis of a block of one: squeezed away before, put back after."""

    def lifted(*arguments: Any) -> Any:
        return walk(fn(*walk(arguments, Tensor, lambda t: t.squeeze(0))), Tensor, lambda t: t.unsqueeze(0))

    return lifted


def many(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The client axis of a block: added by `torch.vmap`, which knows no rule for fused attention kernels."""
    batched = torch.vmap(fn)

    def lifted(*arguments: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return batched(*arguments)

    return lifted


@dataclass
class Direct:
    """Payloads pass as they are; their packed size is computed."""

    def introduce(self, schema: Schema, way: str, ids: Tensor) -> int:
        """Bytes of the schema's text."""
        return len(schema.text)

    def move(self, way: str, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """The payload itself, and the bytes of each row: the same for all, unless control fields decide them.

        What is compressed has to be packed to know its size; rows that are one and the same are packed once.
        """
        first = row(payload, 0)
        if all(tensor.stride(0) == 0 for tensor in payload.values()) or not controlled(payload):
            size = torch.tensor(packed_bytes(first)) if LOSSLESS in payload else nbytes(first)
            return payload, size.cpu().expand(len(ids))
        if LOSSLESS in payload:
            return payload, torch.tensor([packed_bytes(row(payload, place)) for place in range(len(ids))])
        return payload, torch.vmap(nbytes)(payload).cpu()


@dataclass
class Wired:
    """Payloads are packed and unpacked; what arrives is what the bytes say. `tap` sees every message."""

    schemas: dict[int, Schema] = field(default_factory=dict)
    largest: int = 0  # bytes of the largest tensors that were announced
    tap: Callable[[bytes], None] | None = None

    def introduce(self, schema: Schema, way: str, ids: Tensor) -> int:
        """Send the schema as bytes and learn it from them."""
        data = pack_schema(schema)
        self._tap(data)
        learnt = unpack_schema(data)
        self.schemas[learnt.id] = learnt
        self.largest = max(self.largest, schema.dense)
        return len(data) - FRAME

    def move(self, way: str, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """Each row as bytes and back."""
        arrived, sizes = [], []
        for place, i in enumerate(ids.tolist()):
            mine = row(payload, place)
            data = pack(Frame(kind, mine, round, i))
            self._tap(data)
            sizes.append(len(data) - FRAME)
            got = unpack(data, self.schemas, self.largest).payload
            arrived.append({name: tensor.to(mine[name].device) for name, tensor in got.items()})
        return stack(arrived), torch.tensor(sizes)

    def _tap(self, data: bytes) -> None:
        if self.tap is not None:
            self.tap(data)


@dataclass(frozen=True)
class Path:
    """Which way an engine took, and why, for the record. block: most clients of a block; least: blocks of a cohort."""

    name: str
    path: str
    block: int
    why: str
    least: int = 1
    fused: Fused | None = field(default=None, repr=False, compare=False)
    rows: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    saved: int = field(default=0, repr=False, compare=False)
    keep: int = field(default=0, repr=False, compare=False)


def choose(name: str, work: Work, block: int | None, keep: int = 0, apart: str = "") -> Path:
    """The way to run: by the engine's name, the model's structure and its size. Errors: `UnknownName`.

    keep: bytes for what frozen layers make of the samples (prefix.py). apart: why not layer by layer, if so.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES, "engine")
    require(block is None or block >= 1, f"block: at least 1 client; got {block}")
    if name == "ray":
        return replace(choose("stacked", work, block, keep, apart), name="ray")
    if name in ("sequential", "loopback", "flower"):
        return Path(name, SINGLE, 1, "asked for")
    reason = work.task.sequential_only or _probe(work)
    if reason:
        return Path("sequential", SINGLE, 1, reason)
    fused = apart or fused_or_reason(work, keep)
    d = max(1, work.split.layout.d + work.split.personal.d)
    most = min(50, LAYER_VALUES // d) if isinstance(fused, Fused) else min(64, BLOCK_VALUES // d)
    size = block or max(1, most)
    why = f"blocks of {size}, " + ("asked for" if block else "by the size of the model")
    if isinstance(fused, str):
        return Path("stacked", VMAP, size, f"{why}; not layer by layer: {fused}")
    if fused.prefix is not None:
        last = fused.prefix.layers[-1]
        why += f"; up to {last} computed once, {fused.prefix.most} of {int(work.task.train.sizes.sum())} samples kept"
    return Path("stacked", LAYERS, size, why, fused=fused, rows=fused.rows, saved=fused.saved, keep=keep)


def _probe(work: Work) -> str:
    """Why one stacked step of two copies of the first client fails, or ""."""
    ids = torch.zeros(2, dtype=torch.int64)
    try:
        own = stack([work.newcomer()] * 2)
        start = work.split.x0.expand(2, -1)
        local = many(lambda x, o: client.begin(work, x, o))(start, own)
        batch = work.task.train.fetch(ids, torch.zeros(2, 2, dtype=torch.int64))
        batch["mask"] = torch.ones(2, 2, dtype=torch.bool, device=start.device)
        lr_scale = torch.ones((), dtype=start.dtype, device=start.device)
        held = {"x": work.split.x0}
        many(lambda r, s, k: client.step(work, held, r, s, k, lr_scale))(local, batch, ids.to(start.device))
    except Exception as error:  # whatever vmap or the model raises: one at a time still works
        return f"torch.vmap cannot batch this model: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def trainer(work: Work, sync: SyncRule, batch_size: int, key: Key, path: Path) -> Trainer:
    """The clients' half on a path that was chosen, here or on another machine. key: of the run."""
    lift = one if path.path == SINGLE else many
    way = path.fused or (_elsewhere(work, path) if path.path == LAYERS else Plain(work, lift))
    return Trainer(work, sync, batch_size, random.fold(key, "client"), way, lift)


def _elsewhere(work: Work, path: Path) -> Fused:
    """The layer-by-layer way of a path that was chosen in another process."""
    fused = Fused(work, path.rows, path.saved)
    fused.look(path.keep)
    return fused


def sends_drift(work: Work) -> bool:
    """True if what arrives of a client is its drift and nothing else depends on it, so that a sum of drifts is enough.

    Where the size of a message depends on what is in it, each client's own is needed.
    """
    layout = work.split.layout
    if work.codec.lossy or work.codec.init(layout) != ({}, {}) or work.solver.init(work.split):
        return False
    u = random.normal(random.key(0), layout.d).to(work.split.x0)
    message, kept = work.solver.message(client.begin(work, work.split.x0, work.newcomer())["solver"], u)
    payload, _ = work.codec.encode(message, {}, random.key(0), layout=layout, knobs={})
    decoded, _ = work.codec.decode(payload, {}, layout=layout)
    return not kept and not controlled(payload) and torch.equal(decoded, u)


def _crew(work: Work, method: Method, key: Key, path: Path, workers: int | None) -> Crew:
    """Who trains, on this machine or on a cluster."""
    parts = work, method.sync, method.batch_size, key
    if path.name == "ray":
        return actors(partial(trainer, *parts, replace(path, fused=None)), workers, work.split.x0.device)
    if (workers or 1) > 1:
        require(path.name != "loopback", "workers: the loopback engine has one process; use stacked or sequential")
        return forked(trainer(*parts, path), workers or 1, lend=method.aggregator.linear)
    return Alone(trainer(*parts, path))


def build(
    name: str,
    work: Work,
    method: Method,
    key: Key,
    *,
    block: int | None = None,
    workers: int | None = None,
    least: int | None = None,
    keep: int = 0,
    lose: Lose | None = None,
    share: Timed | None = None,
    seconds: Timed | None = None,
    facts: Record | None = None,
    each: bool = False,
    sites: Callable[[Work, SyncRule], Sites] | None = None,
) -> tuple[LocalEngine, Path]:
    """The engine of that name, and the path it takes. name: one of `ENGINES`; auto is stacked where possible.

    workers: processes that train, 1 unless given; for ray its actors, all CPUs of the cluster unless given. With more than
    one, and with ray, the engine must be closed (`engine.crew.close()`). least: blocks that a cohort is cut into at least,
    as many as workers unless given; it and `block` decide the bits. each: every client's update is looked at, so that sums
    of them are not enough. keep: bytes, in each process, for features of frozen layers (prefix.py). share: weighs each
    client's update by its time; seconds: that time, which a policy that learns is told. facts [N, ..]: of the clients'
    data, sent once beside the number of samples. sites: where clients are, for flower.
    """
    require(workers is None or workers >= 1, f"workers: at least 1; got {workers}")
    path = choose(name, work, block, keep, apart(method.precision))
    keep_freed_memory()
    wired, lift, split = path.name == "loopback", one if path.path == SINGLE else many, work.split
    clients = ClientStore(len(work.task.train.sizes))
    if (sites is None) != (path.name != "flower"):
        raise ConfigError('engine = "flower" needs sites, where clients are: `taciturn deploy` starts such a run')
    away = None if sites is None else sites(work, method.sync)
    carrier = away or (Wired() if wired else Direct())
    places = {"copies": wired, "away": away is not None, "base": split.base, "kinds": split.kinds}
    post = Post(carrier, method.broadcast, split.layout, clients, split.x0, **places)  # type: ignore[arg-type]
    crew: Crew = _crew(work, method, key, path, workers) if away is None else away
    path = replace(path, least=least or crew.count)
    each = each or share is not None or learns(method.precision)
    summed = not each and path.fused is not None and method.aggregator.linear and sends_drift(work)
    engine = LocalEngine(
        work, method, post, clients, crew, path.block, path.least,
        lift=lift, summed=summed, lose=lose, share=share, seconds=seconds, facts=facts,
        own=NEWCOMER if away is not None else None,
    )  # fmt: skip
    if away is not None:
        away.bind(engine.store, post, clients, facts or {}, told(method.precision))
    return engine, path
