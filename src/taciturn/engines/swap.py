"""A user's model for a block of clients: modules that are trained are swapped for stacked layers, all else runs as it is.

The copy of the model shares the tensors of the original. What is frozen is the same for all clients and works on the flat
batch [m b, ..] at once; modules with weights of each client's own (layers.py) take them from the step in progress. That is
right for models that treat samples one by one, and it is not believed but checked: before a run, two local steps of two
clients are compared with the plain path (fused.py).

Refused, with the reason: trained weights outside known layers or in partly frozen ones, tied weights, modules that are
called twice or never, hooks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from taciturn.core.types import Split
from taciturn.core.vector import Layout
from taciturn.engines.layers import Run, Step, adapter_of, layer_of, linear_weights


class Refusal(Exception):
    """Why a model cannot be stacked layer by layer."""


class StandIn(nn.Module):
    """Runs something else in the place of a module, and reads like it."""

    def __init__(self, like: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        object.__setattr__(self, "like", like)  # not a submodule: its weights are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "like"), name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What stands here."""
        return self.run(*inputs, **options)


class Program:
    """x [m b, ..], step -> the model's output, with each client's own weights. trainable: names. Errors: `Refusal`.

    stacked: names of the layers with each client's own weights; called: those that the last pass has called; linear: names
    of the weights that are multiplied with rows.
    """

    step: Step

    def __init__(self, model: nn.Module, trainable: frozenset[str]) -> None:
        _refuse_odd_weights(model, trainable)
        tensors = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(t): t for t in tensors})
        self.stacked: set[str] = set()
        self.linear: set[str] = set()
        self.called: set[str] = set()
        seen: set[str] = set()
        for name, module, (run, names) in list(_outermost(self.model, trainable)):
            if not names <= trainable:
                raise Refusal(f"{name} is partly frozen")
            shown = copy.deepcopy(module).to("meta")  # who reads its weights from outside gets no values of them
            self.put(name, StandIn(shown, self._layer(name, run)))
            self.stacked.add(name)
            self.linear |= linear_weights(run)
            seen |= names
        if seen != trainable:
            name = min(trainable - seen)
            owner = model.get_submodule(name.rpartition(".")[0])
            kind = f"in a {type(owner).__name__}, which is not a known layer" if owner is not model else "outside any layer"
            raise Refusal(f"{name} is trained {kind}")

    def put(self, name: str, module: nn.Module) -> None:
        """Replace a module of the copy."""
        if name:
            self.model.set_submodule(name, module)
        else:
            self.model = module

    def _layer(self, name: str, run: Run) -> Run:
        def stacked(*inputs: Any, **options: Any) -> Any:
            if name in self.called:
                raise Refusal(f"{name} is called 2 times")  # each gradient is applied at once
            self.called.add(name)
            return run(self.step, *inputs, **options)

        return stacked

    def __call__(self, x: Tensor, step: Step) -> Any:
        """One pass; the weights' gradients go to the step's sink in its backward pass."""
        self.step = step
        self.called.clear()
        return self.model(x)

    def refuse_idle(self) -> None:
        """Errors: `Refusal` if the last pass left out a stacked layer: its first backward pass would not write it."""
        for name in sorted(self.stacked - self.called):
            raise Refusal(f"{name} is called 0 times")


def in_model(split: Split) -> tuple[Layout, Layout]:
    """The layouts of y and v under the names that the model gives their tensors. Errors: `Refusal`.

    What y holds after the model's own (core/extended.py) is left out.
    """
    views = split.layout.views(split.x0), split.personal.views(split.v0)
    joined = {id(tensor): name for name, tensor in split.join({}, *views).items()}
    names = [[joined.pop(id(tensor), "") for tensor in view.values()] for view in views]
    shared, personal = list(itertools.takewhile(bool, names[0])), names[1]
    if joined or not all(personal) or any(names[0][len(shared) :]) or (names[0] and not shared):
        raise Refusal("what its partition joins is not the views of both vectors")
    own = Layout(tuple(shared), split.layout.shapes[: len(shared)])
    return own, replace(split.personal, names=tuple(personal))


def _known(module: nn.Module, name: str) -> tuple[Run, frozenset[str]] | None:
    """How a module runs for a block of clients, and the names in the model of what is trained of it."""
    run = layer_of(module, name)
    names = (f"{name}.{own}" if name else own for own, _ in module.named_parameters())
    return adapter_of(module, name) if run is None else (run, frozenset(names))


def _outermost(model: nn.Module, trainable: frozenset[str]) -> Iterator[tuple[str, nn.Module, tuple[Run, frozenset[str]]]]:
    """Known layers with trained weights, none inside another."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        known = None if inside else _known(module, name)
        if known is not None and not trainable.isdisjoint(known[1]):
            found.append(name)
            yield name, module, known


def _refuse_odd_weights(model: nn.Module, trainable: frozenset[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        if len(group) > 1 and not trainable.isdisjoint(group):
            raise Refusal(f"{' and '.join(group[:2])} are tied weights")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Refusal(f"{name or 'the model'} has hooks")
        if hasattr(module, "parametrizations"):
            raise Refusal(f"{name or 'the model'} is parametrized")
