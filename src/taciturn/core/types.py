"""The protocols that parts implement and the records that travel between them, all on this page.

Symbols: d shared parameters, p personal parameters, q tracked buffers; M clients of this round's cohort, N clients
in all, m clients of a block, b samples of a batch. Code that runs on a client has no client axis: the stacked engine
adds it with `torch.vmap`, so such code uses only operations that vmap, never `.item()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.vector import Kind, Layout, Vector

Record: TypeAlias = dict[str, Tensor]
Payload: TypeAlias = dict[str, Tensor]  # exactly what goes on the wire, in wire dtypes
Merges: TypeAlias = dict[str, tuple[Tensor, Tensor]]  # products X [m, K] Y [K, n] for the frozen base, by layer
Batch: TypeAlias = dict[str, Tensor]  # named tensors [b, ..] and "mask" [b] bool: False marks padding
Oracle: TypeAlias = Callable[[Vector, Vector, Batch], tuple[Tensor, Vector, Vector]]  # y, v, batch -> loss, g_y, g_v


# ---------------------------------------------------------------------------------------------------- records
@dataclass(frozen=True)
class Split:
    """A model cut into what is shared and what stays on the client.
    layout/x0: the shared vector [d]; personal/v0: the personal vector [p]; buffers/b0: statistics that the model
    itself updates in training (BatchNorm) [q], always personal. `join(held, shared, personal)` takes the named views of
    y and v and gives the named parameters for `torch.func.functional_call`; `held` is what the client keeps of the last
    broadcast: "x" [d] and, where a method merges products into the frozen layers of `base` [m, n], their sum "base".
    merging: the split for such methods. kinds: of clients that work on parts of x; kind_of: round, ids [m] -> [m] int64.
    """

    layout: Layout
    personal: Layout
    buffers: Layout
    x0: Vector
    v0: Vector
    b0: Vector
    join: Callable[[State, Record, Record], Record]
    base: Layout = Layout((), ())
    merging: Split | None = None
    kinds: tuple[Kind, ...] = ()
    kind_of: Callable[[int, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """What differs between the clients of a cohort, as data. Every tensor is [M], in the order of `ids`.
    epoch_steps: local steps of one pass over its data; limit: steps after which a client halts by itself; weights: what
    it counts in the average; lr_scale: factor of the client learning rate in this round (a schedule); knobs: numbers that
    each client is told (precision/policies.py).
    """

    round: int
    ids: Tensor
    epoch_steps: Tensor
    limit: Tensor
    weights: Tensor
    lr_scale: float = 1.0
    knobs: State = field(default_factory=dict)


OK, BAD_LOSS, BAD_UPDATE, LOST, LATE = range(5)
STATUS = ("ok", "loss not finite", "update not finite", "no answer", "after the deadline")


@dataclass(frozen=True)
class Block:
    """Decoded messages of m clients of equal shape. `start` [m, d] is what each client HELD, not the server's x. A linear
    aggregator may get them summed: `updates` has no rows, `total` is their weighted sum.
    """

    ids: Tensor  # [m] int64
    start: Tensor  # [m, d]
    updates: Tensor  # [m, d] or [0, d]
    weights: Tensor  # [m]
    layout: Layout
    stats: dict[str, Tensor]  # {name: [m]}
    status: Tensor  # [m] int64, index into STATUS
    total: Tensor | None = None  # [d]
    kind: Kind = Kind()  # of all m clients: updates are zero outside kind.trains, start outside kind.holds

    def sum(self) -> Tensor:
        """Sum over clients of weight times update [d]."""
        return self.weights.to(self.updates.dtype) @ self.updates if self.total is None else self.total


@dataclass(frozen=True)
class Change:
    """What the server applies: an update of x [d], and low-rank products X Y for the frozen base."""

    update: Vector
    merges: Merges = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)  # what the record keeps of the aggregation


@dataclass(frozen=True)
class Observations:
    """What came back during a round: payload [M, ..] by name, which clients were heard, which are still training. Rows of
    clients that were not heard mean nothing. done: local steps of each; spent: of this round so far."""

    payload: Payload
    heard: Tensor  # [M] bool
    live: Tensor  # [M] bool
    done: Tensor  # [M] int64
    spent: Spent


@dataclass(frozen=True)
class Spent:
    """A client's mean cost of a round: bytes (but what is sent once), round trips; clocked seconds of a step, of a look."""

    up: float = 0.0
    down: float = 0.0
    exchanges: int = 0
    step_seconds: float = 0.0
    look_seconds: float = 0.0


@dataclass(frozen=True)
class Cast:
    """A published model: its version, what every receiver of that version holds, and the frames that lead there.
    log: (version, payload) in order; a receiver at version s applies every frame with a version above s. merges: the
    same for the base. source: the server round whose x this is; publishing the same x twice is one publication. kinds: of
    each kind of client the cast of what it holds; None: this one.
    """

    version: int
    source: int
    held: State
    log: tuple[tuple[int, Payload], ...] = ()
    merges: tuple[tuple[int, Payload], ...] = ()
    kinds: tuple[Cast | None, ...] = ()


# -------------------------------------------------------------------------------------------------- protocols
class Partition(Protocol):
    """WHAT is shared."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model that clients train, in place of the user's (a copy of it): adapters are put in here."""
        ...

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """Cut the model; `tracked` names the buffers that training changes. Errors: `ModelError` with the remedy."""
        ...


class Codec(Protocol):
    """HOW a vector is encoded: C(u) = decode(encode(u)). `tx` is state of the sender, `rx` of the receiver.
    Where theory knows more, a codec also has `linear_map(d) -> (a, b, c) | None`, with E[C(u)C(u)'] = a uu' + b Diag(u^2)
    + c |u|^2 I for every u, or `variance(u [.., d]) -> [.., d]`, the diagonal of a covariance of C(u) that is diagonal.
    """

    @property
    def lossy(self) -> bool:
        """True if decode(encode(u)) may differ from u."""
        ...

    @property
    def unbiased(self) -> bool:
        """True if E C(u) = u for every u, over the key."""
        ...

    def message_bits(self, d: int) -> float:
        """Bits of the body of a message, for one tensor of d values; expected, where they are random."""
        ...

    def omega(self, d: int) -> float:
        """A bound: E|C(u) - u|^2 <= omega |u|^2 for one tensor of d values; infinite if there is none."""
        ...

    def init(self, layout: Layout) -> tuple[State, State]:
        """Fresh (tx, rx) for vectors of this layout."""
        ...

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> payload of fixed shapes, and the sender's next state. `knobs`: this client's row of numbers."""
        ...

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """payload -> [d], and the receiver's next state."""
        ...


class Solver(Protocol):
    """HOW a client trains: pure functions of a record that holds at least y [d] and v [p]. `extend(split) -> Split` of one
    that shares values of its own (core/extended.py). One that sends a point, no change, has `point = True`, `tell(local) ->
    Record` of numbers [] to ride on the upload, and `settle(state, arrived [d]) -> State`, for what arrives binds both."""

    @property
    def schedule(self) -> Callable[[int], float]:
        """Round -> factor of the learning rate."""
        ...

    def init(self, split: Split) -> State:
        """What a new client keeps between rounds besides v (duals, control variates)."""
        ...

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """The local record at the start of a round."""
        ...

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One local step -> the next record, and the loss [] of the batch at the point where the gradient was taken."""
        ...

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """What the client sends, given its drift u = y - start [d], and what it keeps."""
        ...

    def affine(self) -> tuple[float, float] | None:
        """(lr, mu) if a step is y <- y - lr (g + mu (y - x)) and nothing else, so that an engine may fuse it; else None.
        An engine that fuses the steps knows u and keeps no y: `message` must not read local["y"].
        """
        ...


class SyncRule(Protocol):
    """WHEN to synchronise. The state is the server's; clients know of it what `signal` tells them."""

    @property
    def observer(self) -> Literal["nobody", "client", "server"]:
        """Who looks while clients train. The server: a message after each stride. Each client at itself, stride after
        stride: the round is one exchange, and the last payload rides on the upload. Nobody: one stride, one exchange.
        """
        ...

    def init(self, x: Vector) -> State:
        """The server's state of the rule before the first round."""
        ...

    def schedule(self, epoch_steps: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Steps of an epoch of each client [M] -> steps after which it halts [M], and of its first stride [M]."""
        ...

    def signal(self, state: State) -> Payload:
        """What every client is told when the round begins."""
        ...

    def observe(self, u: Vector, told: Record, signal: Payload) -> tuple[Payload, Tensor]:
        """On a client, after a stride: (a few bytes, go on [] bool). u [d] drift; told: "done" [], "loss" [] summed."""
        ...

    def watch(self, seen: Observations, plan: Plan, state: State) -> tuple[Tensor | None, State]:
        """On the server, after a stride: the steps of the next one [M], or None to end the round; and its state."""
        ...

    def update(self, state: State, plan: Plan, stats: Record, spent: Spent, change: Change) -> State:
        """The state for the next round. stats [M]: "loss", "steps", "status", and what rode on the upload."""
        ...

    def tell(self, state: State) -> dict[str, Any]:
        """What the record keeps of the round, as plain numbers and lists of them."""
        ...


class Aggregator(Protocol):
    """Many -> one. `linear`: a weighted sum of updates is enough, so blocks may arrive already summed. An aggregator says
    of itself `merges = True` if its changes have them; `kinds`: it knows blocks of several; `remembers`: it keeps the mean
    of what clients keep, so that none of them can begin anew."""

    @property
    def linear(self) -> bool: ...

    def weigh(self, sizes: Tensor) -> Tensor:
        """Samples of each client [M] -> its weight [M] (any scale)."""
        ...

    def init(self, x: Vector, sizes: Tensor) -> State:
        """The server's state of the aggregate (a running mean). sizes [N]: samples of every client there is."""
        ...

    def start(self, state: State, x: Vector) -> Any:
        """An empty accumulator."""
        ...

    def add(self, acc: Any, block: Block) -> Any:
        """The accumulator with one more block; rows that are not OK have been zeroed and weigh nothing."""
        ...

    def finish(self, acc: Any) -> tuple[Change, State]:
        """The aggregate, and the state to keep."""
        ...


class ServerOptimizer(Protocol):
    """FedOpt: x <- step(x, -update). State named "average" [d], if there is any, is the model to evaluate and to keep."""

    def init(self, x: Vector) -> State: ...
    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]: ...


class Participation(Protocol):
    """WHO takes part."""

    def draw(self, round: int, key: Key, available: Tensor) -> Tensor:
        """available [N] bool -> ids [M] int64, M >= 1, no id twice."""
        ...


class Clients(Protocol):
    """Data of N clients: one split of it (train, test)."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def sizes(self) -> Tensor:
        """[N] int64 samples."""
        ...

    def fetch(self, ids: Tensor, index: Tensor, keys: Key | None = None) -> Batch:
        """Samples `index` [m, b] of clients `ids` [m] -> named tensors [m, b, ..].
        keys [m]: of this client and step, for data sets that draw at random while they are read (augmentation).
        """
        ...


class Task(Protocol):
    """The border to the user's world: model, loss, metrics and data. Built once, then read only."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def train(self) -> Clients: ...

    @property
    def tracked(self) -> frozenset[str]:
        """Buffers that a training step changes."""
        ...

    @property
    def sequential_only(self) -> str:
        """Why the stacked path cannot run this model, or "" if it can."""
        ...

    def held_out(self, split: str) -> Clients:
        """The clients' own data of a split: "train", "validation" or "test"."""
        ...

    @property
    def plain(self) -> bool:
        """True if the model is called as model(batch["input"]), so that an engine may trace it."""
        ...

    def cast(self, batch: Batch) -> Batch:
        """The batch with its floats in the run's precision."""
        ...

    def values(self, output: Any, target: Tensor) -> Tensor:
        """Loss of each sample [n]."""
        ...

    def randomness(self, key: Key) -> AbstractContextManager[None]:
        """What a training step runs under: key [], or [m] for the samples of m clients, one client after the other."""
        ...

    def loss(self, params: dict[str, Tensor], batch: Batch, key: Key) -> Tensor:
        """Mean loss [] over the samples that are not padding, in training mode with randomness from the key."""
        ...

    def measure(self, params: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Sums [] over the samples that are not padding, in evaluation mode: "count", "loss" and each metric."""
        ...


class Engine(Protocol):
    """WHERE clients run."""

    def begin(self, cast: Cast, plan: Plan, signal: Payload) -> None:
        """Send each client of the plan what it lacks, and the sync rule's signal; training starts with `advance`."""
        ...

    def advance(self, steps: Tensor) -> Observations:
        """Up to `steps` [M] local steps on every live client; then a few bytes from each."""
        ...

    def collect(self) -> Iterator[Block]:
        """The decoded uploads, block after block; a block may be dropped once it is aggregated."""
        ...

    def spent(self) -> Spent:
        """What the round has cost so far."""
        ...

    def commit(self, accepted: Tensor) -> None:
        """These clients keep their new state; all others stay as if they had not been drawn."""
        ...

    def evaluate(self, ids: Tensor, cast: Cast, split: str) -> dict[str, Tensor]:
        """Sums [len(ids)] by name, measured where the data are."""
        ...
