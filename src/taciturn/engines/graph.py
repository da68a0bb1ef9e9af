"""A user's model as a list of nodes, for a block of clients.

The model is traced by torch.fx. Modules with weights become stacked layers; everything else runs as it is on the flat
batch [m b, ..]. That is right for models that treat samples one by one, and it is not believed but checked: before a run,
two local steps of two clients are compared with the plain path (fused.py).

Refused, with the reason: models that fx cannot trace, weights outside known layers, modules that are called twice, tied
or frozen weights, hooks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from taciturn.engines.layers import Layer, Step, call, layer_of


class Refusal(Exception):
    """Why a model cannot be stacked layer by layer."""


@dataclass(frozen=True)
class Graph:
    """The traced model: its nodes in order, its modules, and the stacked `layers` by module name."""

    nodes: tuple[fx.Node, ...]
    modules: dict[str, nn.Module]
    layers: dict[str, tuple[Callable[[Tensor], Tensor] | None, Layer]]

    def run(self, step: Step, x: Tensor) -> Any:
        """[m b, ..] -> the model's output, with each client's own weights."""
        values: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = x
                continue
            args = fx.node.map_arg(node.args, values.__getitem__)
            if node.op == "output":
                return args[0]
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = self._value(node, step, args, kwargs)
        raise AssertionError("a graph ends in its output")

    def _value(self, node: fx.Node, step: Step, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            return getattr(self.modules[owner], name)
        if target not in self.layers:
            return self.modules[target](*args, **kwargs)
        before, layer = self.layers[target]
        return call(layer, step, args[0] if before is None else before(args[0]))


def trace(model: nn.Module, trainable: frozenset[str]) -> Graph:
    """The graph of a model whose trainable parameters have these names. Errors: `Refusal`."""
    _refuse_odd_weights(model, trainable)
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise Refusal(f"torch.fx cannot trace it: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    layers, seen = {}, set()
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise Refusal("it takes more than one input")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in trainable:
            raise Refusal(f"{node.target} is used outside a known layer")
        if node.op != "call_module":
            continue
        part = model.get_submodule(node.target)
        names = {f"{node.target}.{name}" for name, _ in part.named_parameters()}
        if not names:
            continue
        found = layer_of(part, node.target)
        if found is None or len(node.args) != 1 or node.kwargs:
            raise Refusal(f"{node.target} is a {type(part).__name__}, which is not a known layer")
        if calls[node.target] > 1:
            raise Refusal(f"{node.target} is called {calls[node.target]} times")
        layers[node.target] = found
        seen |= names
    if seen != trainable:
        raise Refusal(f"{', '.join(sorted(trainable ^ seen)[:3])} is trained in no known layer")
    return Graph(tuple(graph.nodes), dict(model.named_modules()), layers)


def _refuse_odd_weights(model: nn.Module, trainable: frozenset[str]) -> None:
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if any(count > 1 for count in names.values()):
        raise Refusal("it has tied weights")
    frozen = {name for name, _ in model.named_parameters()} - trainable
    if frozen:
        raise Refusal(f"{min(frozen)} is frozen")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Refusal(f"{name or 'the model'} has hooks")
        if hasattr(module, "parametrizations"):
            raise Refusal(f"{name or 'the model'} is parametrized")
