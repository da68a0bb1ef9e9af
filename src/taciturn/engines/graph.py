"""A user's model, rewritten for a block of clients.

The model is traced by torch.fx. Modules with weights become stacked layers; everything else runs as it is on the flat
batch [m b, ..]. That is right for models that treat samples one by one, and it is not believed but checked: before a run,
two local steps of two clients are compared with the plain path (fused.py).

Refused, with the reason: models that fx cannot trace, weights outside known layers, modules that are called twice, tied
or frozen weights, hooks.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from taciturn.engines.layers import Stacked, Step, layer_of

Program = Callable[[Tensor, Step], Any]  # x [m b, ..], step -> the model's output, with each client's own weights


class Refusal(Exception):
    """Why a model cannot be stacked layer by layer."""


class _Tracer(fx.Tracer):
    """Keeps known layers whole, and looks into the transformers of torch.nn, whose own text fx cannot follow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {module for name, module in model.named_modules() if layer_of(module, name) is not None}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for modules that are not looked into."""
        return m in self.known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A module as a node, or as what it is made of."""
        plain = {nn.TransformerEncoder: _encoder, nn.TransformerEncoderLayer: _encoder_layer}.get(type(m))
        return super().call_module(m, forward, args, kwargs) if plain is None else plain(m, *args, **kwargs)


def _encoder(m: Any, x: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None) -> Any:
    """`nn.TransformerEncoder` in training mode, without padding masks."""
    if src_key_padding_mask is not None or (mask is not None and is_causal is None):
        raise Refusal("TransformerEncoder: padding masks and masks without is_causal are not known")
    for layer in m.layers:
        x = layer(x, src_mask=mask, is_causal=bool(is_causal))
    return x if m.norm is None else m.norm(x)


def _encoder_layer(m: Any, x: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False) -> Any:
    """`nn.TransformerEncoderLayer` in training mode: attention and two linear layers, each with a residual and a norm."""
    if m.norm_first:
        x = x + m._sa_block(m.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(x + m._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
    return m.norm2(x + m._ff_block(x))


def rewrite(model: nn.Module, trainable: frozenset[str]) -> Program:
    """The program of a model whose trainable parameters have these names. Errors: `Refusal`."""
    _refuse_odd_weights(model, trainable)
    try:
        graph = _Tracer(model).trace(model)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"torch.fx cannot trace it: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise Refusal("it takes more than one input")
    with graph.inserting_after(inputs[0]):
        step = graph.placeholder("step")
    graph.eliminate_dead_code(lambda node: node.target is not operator.getitem)  # `y, _ = attention(..)`
    root = _replace(model, graph, step, trainable)
    _must_reach_output(graph, step)
    module = fx.GraphModule(root, graph)
    return module.forward


def _replace(model: nn.Module, graph: fx.Graph, step: fx.Node, trainable: frozenset[str]) -> dict[str, Any]:
    """Give every layer with weights its step; -> what the graph's nodes refer to, by name."""
    root: dict[str, Any] = {}
    seen: set[str] = set()
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target in trainable:
                raise Refusal(f"{node.target} is used outside a known layer")
            owner, _, name = node.target.rpartition(".")
            root[node.target] = getattr(model.get_submodule(owner), name)
        if node.op != "call_module":
            continue
        part = root[node.target] = model.get_submodule(node.target)
        names = {f"{node.target}.{name}" for name, _ in part.named_parameters()}
        if not names:
            continue
        run = layer_of(part, node.target)
        if run is None:
            raise Refusal(f"{node.target} is a {type(part).__name__}, which is not a known layer")
        if calls[node.target] > 1:
            raise Refusal(f"{node.target} is called {calls[node.target]} times")
        root[node.target], node.args = Stacked(run), (step, *node.args)
        seen |= names
    if seen != trainable:
        raise Refusal(f"{', '.join(sorted(trainable ^ seen)[:3])} is trained in no known layer")
    return root


def _must_reach_output(graph: fx.Graph, step: fx.Node) -> None:
    """The first step writes each weight in its backward pass, so a layer that feeds nothing would leave it unwritten."""
    reached, todo = set(), [node for node in graph.nodes if node.op == "output"]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in reached:
                reached.add(node)
                todo.append(node)
    idle = sorted(str(node.target) for node in step.users if node not in reached)
    if idle:
        raise Refusal(f"{idle[0]} does not reach the output")


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
