"""What frozen modules below the first trained one make of a sample: computed once, and kept. And what autograd keeps.

A frozen prefix gives the same features for a sample in every step of every round. Where the model's text is cut is found by
running it: modules that end before the first trained layer begins are candidates, the last of them is where features are
kept, and those before it are skipped. Whether nobody else reads the skipped ones is not believed but checked: they give
nan, and the output must still be the same in every bit.

Features are computed in chunks of a client's samples, the same ones whatever the batch, so that a value does not depend on
what happened to be kept. Symbols: n samples of a flat batch; S training samples of all clients; features [.., f].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taciturn.core.types import Batch, Clients
from taciturn.engines.swap import Program, StandIn

CHUNK = 32  # samples of a client whose features are computed at once
TRIES = 4  # places to cut that are tried
Forward = Callable[..., Any]  # flat batch, number of the draw (0) -> the model's output


class _Found(Exception):
    """Ends a pass at the cut."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


@dataclass
class _Cut:
    """A program with a cut. given: features that stand in for the prefix; wanted: the pass ends at the cut."""

    given: Tensor | None = None
    wanted: bool = False

    def kept(self, like: nn.Module) -> Callable[..., Any]:
        """The last module of the prefix."""

        def run(*inputs: Any, **options: Any) -> Any:
            if self.given is not None:
                return self.given
            features = like(*inputs, **options)
            if self.wanted:
                raise _Found(features)
            return features

        return run

    def skipped(self, like: nn.Module, shape: torch.Size) -> Callable[..., Any]:
        """A module before it."""

        def run(*inputs: Any, **options: Any) -> Any:
            if self.given is None:
                return like(*inputs, **options)
            return self.given.new_full((), torch.nan).expand(len(self.given), *shape[1:])

        return run


@dataclass
class Prefix:
    """Features of training samples, at most `most` of them; the oldest make room. layers: modules that are left out."""

    cut: _Cut
    forward: Forward
    data: Clients
    like: Tensor
    most: int
    layers: tuple[str, ...]
    _pool: Tensor = field(init=False, repr=False)
    _row: Tensor = field(init=False, repr=False)  # of each of the S samples: its row of the pool, -1: not kept
    _owner: Tensor = field(init=False, repr=False)  # of each row: its sample
    _next: int = field(default=0, init=False)
    computed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._first = torch.cat([torch.zeros(1, dtype=torch.int64), self.data.sizes.cumsum(0)])
        self._pool = self.like.new_empty(self.most, *self.like.shape)
        self._row = torch.full((int(self._first[-1]),), -1)
        self._owner = torch.full((self.most,), -1)

    @contextmanager
    def given(self, ids: Tensor, index: Tensor) -> Iterator[None]:
        """What a pass over these samples runs under: their features stand in for the prefix."""
        self.cut.given = self(ids, index)
        try:
            yield
        finally:
            self.cut.given = None

    def __call__(self, ids: Tensor, index: Tensor) -> Tensor:
        """Samples `index` [k, b] of clients `ids` [k] -> features [k b, ..]."""
        samples = (self._first[ids].unsqueeze(1) + index).flatten()
        rows = self._row[samples]
        found = self._pool.index_select(0, rows.clamp(min=0).to(self._pool.device))
        missing = rows < 0
        if missing.any():
            owner = ids.repeat_interleave(index.shape[1])[missing]
            chunks = torch.stack([owner, index.flatten()[missing] // CHUNK])
            for client, chunk in torch.unique(chunks, dim=1).T.tolist():
                self._fill(client, chunk, samples, found)
        return found

    def _fill(self, client: int, chunk: int, samples: Tensor, found: Tensor) -> None:
        """Compute a chunk, keep it, and write what the batch asked of it."""
        a, b = chunk * CHUNK, min((chunk + 1) * CHUNK, int(self.data.sizes[client]))
        features = self._compute(torch.tensor([client]), torch.arange(a, b).unsqueeze(0))
        first = int(self._first[client]) + a
        wanted = ((samples >= first) & (samples < first + b - a)).nonzero().squeeze(1)
        found[wanted.to(found.device)] = features[(samples[wanted] - first).to(found.device)]
        rows = (self._next + torch.arange(b - a)) % self.most
        self._next = (self._next + b - a) % self.most
        gone = self._owner[rows]
        self._row[gone[gone >= 0]] = -1
        self._owner[rows] = torch.arange(first, first + b - a)
        self._row[first : first + b - a] = rows
        self._pool[rows.to(self._pool.device)] = features

    def _compute(self, ids: Tensor, index: Tensor) -> Tensor:
        self.computed += index.numel()
        return features_of(self.cut, self.forward, {n: t.flatten(0, 1) for n, t in self.data.fetch(ids, index).items()})


def features_of(cut: _Cut, forward: Forward, batch: Batch, draw: int = 0) -> Tensor:
    """One pass up to the cut, without a gradient."""
    cut.wanted = True
    try:
        with torch.no_grad():
            forward(batch, draw)
    except _Found as found:
        return found.features
    finally:
        cut.wanted = False
    raise RuntimeError("the model did not reach its cut")


def find(program: Program, forward: Forward, batch: Batch, data: Clients, bytes: int) -> Prefix | None:
    """The longest prefix worth keeping, or None. forward runs the program on a flat batch; batch: two samples or more."""
    if not getattr(data, "fixed", False) or bytes <= 0:
        return None
    with torch.no_grad():
        kept, output = _ended(program, lambda: forward(batch), len(batch["input"]))
        for place in range(len(kept) - 1, max(-1, len(kept) - 1 - TRIES), -1):
            used = kept[: place + 1]
            models = {name: program.model.get_submodule(name) for name, _ in used}
            if not any(True for model in models.values() for _ in model.parameters()):
                return None
            cut = _Cut()
            for name, out in used[:-1]:
                program.put(name, StandIn(models[name], cut.skipped(models[name], out.shape)))
            name, out = used[-1]
            program.put(name, StandIn(models[name], cut.kept(models[name])))
            if _holds(cut, forward, batch, output):
                total, fit = int(data.sizes.sum()), bytes // (out[0].numel() * out.element_size())
                if fit >= min(CHUNK, total):
                    return Prefix(cut, forward, data, out[0], min(fit, total), tuple(models))
            for name, model in models.items():
                program.put(name, model)
    return None


def _holds(cut: _Cut, forward: Forward, batch: Batch, output: Any) -> bool:
    """True if features alone give the model's output, and do not change from one draw to the next (dropout)."""
    features = features_of(cut, forward, batch)
    again = features_of(cut, forward, batch, 1)
    cut.given = features
    try:
        return torch.equal(features, again) and isinstance(output, Tensor) and torch.equal(forward(batch), output)
    except Exception:  # a model that looks at what was skipped may raise anything
        return False
    finally:
        cut.given = None


def _ended(program: Program, run: Callable[[], Any], n: int) -> tuple[list[tuple[str, Tensor]], Any]:
    """Outermost modules that give floats [n, ..], end before the first stacked one begins and are called once, with these
    floats; and run()'s output.
    """
    ended: dict[str, Tensor] = {}
    begun: dict[str, int] = {}
    open_ = True
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal open_
            begun[name] = begun.get(name, 0) + 1
            open_ = open_ and name not in program.stacked

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if open_ and isinstance(output, Tensor) and output.is_floating_point() and output.dim() and len(output) == n:
                for inner in [inner for inner in ended if inner.startswith(f"{name}.")]:
                    del ended[inner]
                ended[name] = output

        return hook

    for name, module in program.model.named_modules():
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return [(name, out) for name, out in ended.items() if name and begun[name] == 1], output


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps of a pass for its backward pass, weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())
