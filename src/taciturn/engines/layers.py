"""Layers that hold the weights of m clients and update them inside the backward pass.

Activations of a block are flat: [m b, ..], the samples of one client after the other, so that everything without weights
runs as in the user's model. A layer with weights cuts that axis into [m, b, ..], computes with its own weights of each
client, and in its backward pass first forms the gradient of its input and then gives each weight's gradient to a `Sink`,
which may apply it at once: no gradient is stored.

Symbols: m clients (k of them still training); b samples of each; W [m, o, i]; x [m b, i]; g [m b, o] gradient of the
output. In the first local step of a round all clients hold the same weights: `shared` layers use them as one big batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taciturn.engines.late import Late

Weights = dict[str, Tensor]  # name -> [m, *shape], or [*shape] where all clients hold the same


class Sink(Protocol):
    """Takes the gradients of one backward pass."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """The gradient is left [m, o, n] @ right [m, n, i]; the weight is any shape of m x (o i) values."""
        ...

    def add(self, name: str, gradient: Tensor) -> None:
        """The gradient is [m, *shape]."""
        ...


@dataclass
class Gather:
    """Gradients by name, for solvers that need them whole."""

    found: Weights

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """gradient = left @ right."""
        self.found[name] = torch.bmm(left, right)

    def add(self, name: str, gradient: Tensor) -> None:
        """gradient = gradient."""
        self.found[name] = gradient


@dataclass
class Step:
    """One local step of a block: weights, where gradients go, and how the clients share the flat batch axis.

    shared: all clients hold `weights` without a client axis; late: weights of linear layers that nobody forms (late.py).
    """

    weights: Weights
    sink: Sink
    m: int
    shared: bool
    late: dict[str, Late] = field(default_factory=dict)

    def apart(self, x: Tensor) -> Tensor:
        """[m b, ..] -> [m, b, ..]."""
        return x.reshape(self.m, -1, *x.shape[1:])


class _Layer(torch.autograd.Function):
    """forward(x) and backward(x, g) of a layer; `anchor` makes the output require a gradient where x does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: Layer, step: Step) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.step = layer, step
        return layer.forward(step, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.layer.backward(ctx.step, x, gradients[0], ctx.needs_input_grad[0]), None, None, None


class Layer(Protocol):
    """A module with weights, for a block of clients."""

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """[m b, ..] -> [m b, ..]."""
        ...

    def backward(self, step: Step, x: Tensor, g: Tensor, needs_x: bool) -> Tensor | None:
        """Gradient of x if it is needed; the weights' gradients go to the sink."""
        ...


Run = Callable[..., Any]  # (step, inputs .., options ..) -> output


_anchor = torch.empty(0, requires_grad=True)


def call(layer: Layer, step: Step, x: Tensor) -> Tensor:
    """The layer as a node of autograd."""
    output: Tensor = _Layer.apply(x, _anchor, layer, step)  # type: ignore[no-untyped-call]
    return output


def linear_weights(run: Run) -> set[str]:
    """Names of the weights that `Linear` applies in a known layer."""
    if isinstance(run, Attention):
        return {run.inner.weight, run.outer.weight}
    return {run.args[0].weight} if isinstance(run, partial) and isinstance(run.args[0], Linear) else set()


@dataclass(frozen=True)
class Linear:
    """y = x W' + c for inputs [m b, .., i]. Source of the update: dW = g' x, dc = sum of g."""

    weight: str
    bias: str | None

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """Through `Late`; else one product for all where they share W, or one a client (`baddbmm`)."""
        c = None if self.bias is None else step.weights[self.bias]
        if (late := step.late.get(self.weight)) is not None:
            y = late.forward(x.reshape(-1, x.shape[-1]), step.m)
            if c is not None:
                y.view(step.m, -1, y.shape[-1]).add_(c if step.shared else c.unsqueeze(1))
        elif step.shared:
            y = F.linear(x, step.weights[self.weight], c)
        else:
            w, rows = step.weights[self.weight], x.reshape(step.m, -1, x.shape[-1])
            y = torch.bmm(rows, w.mT) if c is None else torch.baddbmm(c.unsqueeze(1), rows, w.mT)
        return y.view(*x.shape[:-1], y.shape[-1])

    def backward(self, step: Step, x: Tensor, g: Tensor, needs_x: bool) -> Tensor | None:
        """dx = g W, then the weights."""
        grads = g.reshape(step.m, -1, g.shape[-1])
        dx = None
        if (late := step.late.get(self.weight)) is not None:
            flat, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            if needs_x:
                dx = late.backward(flat, step.m).view(x.shape)
            late.learn(flat, rows, step.m)
        else:
            if needs_x:
                w = step.weights[self.weight]
                dx = g @ w if step.shared else torch.bmm(grads, w).view(x.shape)
            step.sink.product(self.weight, grads.mT, x.reshape(step.m, -1, x.shape[-1]))
        if self.bias is not None:
            step.sink.add(self.bias, grads.sum(1))
        return dx


@dataclass(frozen=True)
class Adapter:
    """y = x W0' + c0 + s (x A') B', W0 [o, i] and c0 frozen and the same for all; A [r, i], B [o, r] each client's own.

    Source of the update: dB = s g' (x A'), dA = (s g B)' x.
    """

    base: nn.Linear
    left: str
    right: str
    scale: float

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """One product for all with W0, and thin ones a client, added in place."""
        y = F.linear(x, self.base.weight, self.base.bias)
        b = self._each(step, self.left)
        y.view(step.m, -1, y.shape[-1]).baddbmm_(self._inner(step, x), b.mT, alpha=self.scale)
        return y

    def backward(self, step: Step, x: Tensor, g: Tensor, needs_x: bool) -> Tensor | None:
        """dx = g W0 + s (g B) A, then the factors."""
        rows = g.reshape(step.m, -1, g.shape[-1])
        inner = torch.bmm(rows, self._each(step, self.left)).mul_(self.scale)
        dx = None
        if needs_x:
            dx = (g.reshape(-1, g.shape[-1]) @ self.base.weight).view(x.shape)
            dx.view(step.m, -1, x.shape[-1]).baddbmm_(inner, self._each(step, self.right))
        step.sink.product(self.left, rows.mT, self._inner(step, x).mul_(self.scale))
        step.sink.product(self.right, inner.mT, x.reshape(step.m, -1, x.shape[-1]))
        return dx

    def _each(self, step: Step, name: str) -> Tensor:
        w = step.weights[name]
        return w.expand(step.m, *w.shape) if step.shared else w

    def _inner(self, step: Step, x: Tensor) -> Tensor:
        """x A' [m, b, r]."""
        return torch.bmm(x.reshape(step.m, -1, x.shape[-1]), self._each(step, self.right).mT)


def _channels_last(x: Tensor) -> Tensor:
    """Images [n, c, h, w] with the channels side by side in memory: pooling is several times faster so."""
    if x.dim() != 4:
        return x.contiguous()
    n, c, h, w = x.shape
    if c == 1:  # the layout of one channel is ambiguous; these strides say it
        return x.contiguous().as_strided((n, 1, h, w), (h * w, 1, w, 1))
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Conv:
    """Convolution in one or two dimensions; client by client where the weights differ."""

    weight: str
    bias: str | None
    options: tuple[Any, ...]  # stride, padding, dilation, transposed, output_padding, groups of aten::convolution

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """One convolution for all clients where they share the weights."""
        x, w, c = _channels_last(x), step.weights[self.weight], step.weights.get(self.bias or "")
        if step.shared:
            return torch.convolution(x, w, c, *self.options)
        parts = x.chunk(step.m)
        biases = [None] * step.m if c is None else c.unbind(0)
        return torch.cat([torch.convolution(p, k, e, *self.options) for p, k, e in zip(parts, w, biases, strict=True)])

    def backward(self, step: Step, x: Tensor, g: Tensor, needs_x: bool) -> Tensor | None:
        """dx as one convolution where the weights are shared; dW client by client."""
        x, g, w = _channels_last(x), _channels_last(g), step.weights[self.weight]
        weights = w.expand(step.m, *w.shape) if step.shared else w
        clients = list(zip(g.chunk(step.m), x.chunk(step.m), weights, strict=True))
        dx = None
        if needs_x and step.shared:
            dx = self._backward(g, x, w, (True, False, False))[0]
        elif needs_x:
            dx = torch.cat([self._backward(*one, (True, False, False))[0] for one in clients])
        step.sink.add(self.weight, torch.stack([self._backward(*one, (False, True, False))[1] for one in clients]))
        if self.bias is not None:
            sums = g.sum(tuple(range(2, g.dim())))  # [m b, o]
            step.sink.add(self.bias, sums.view(step.m, -1, sums.shape[1]).sum(1))
        return dx

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(g, x, w, None, *self.options, mask)


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last axes, GroupNorm over groups of channels: y = xhat W + c, xhat without weights."""

    weight: str
    bias: str | None
    channels: bool  # GroupNorm: the weight belongs to axis 1, else to the last axes

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """x is normalised already (by autograd); here weight and bias."""
        y = step.apart(x) * self._wide(step, self.weight, x)
        if self.bias is not None:
            y = y + self._wide(step, self.bias, x)
        return y.reshape(x.shape)

    def backward(self, step: Step, x: Tensor, g: Tensor, needs_x: bool) -> Tensor | None:
        """dx = g W; dW = sum of g x over samples and the axes that the weight does not have."""
        dx = (step.apart(g) * self._wide(step, self.weight, x)).reshape(x.shape) if needs_x else None
        step.sink.add(self.weight, self._narrow(step, g * x))
        if self.bias is not None:
            step.sink.add(self.bias, self._narrow(step, g))
        return dx

    def _wide(self, step: Step, name: str, x: Tensor) -> Tensor:
        """The weight with axes that broadcast over [m, b, ..]."""
        w = step.weights[name]
        w = w.unsqueeze(0) if step.shared else w
        if self.channels:
            return w.reshape(w.shape[0], 1, -1, *(1 for _ in x.shape[2:]))
        return w.reshape(w.shape[0], *(1 for _ in range(x.dim() - (w.dim() - 1))), *w.shape[1:])

    def _narrow(self, step: Step, value: Tensor) -> Tensor:
        """Sum [m b, ..] over everything but clients and the weight's own axes."""
        shape = step.weights[self.weight].shape[0 if step.shared else 1 :]
        parts = step.apart(value)
        if self.channels:
            return parts.flatten(3).sum((1, 3)) if parts.dim() > 3 else parts.sum(1)
        return parts.reshape(step.m, -1, *shape).sum(1)


@dataclass(frozen=True)
class Embedding:
    """Rows of W [vocabulary, width] by index [m b, ..]; dW adds g up by index."""

    weight: str
    padding: int | None

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """Look up each client's own table."""
        w = step.weights[self.weight]
        if step.shared:
            return F.embedding(x, w)
        rows = step.apart(x).flatten(1)
        picked = w.gather(1, rows.unsqueeze(-1).expand(-1, -1, w.shape[-1]))
        return picked.reshape(*x.shape, w.shape[-1])

    def backward(self, step: Step, x: Tensor, g: Tensor, needs_x: bool) -> Tensor | None:
        """The gradient of the table; indices have none."""
        w = step.weights[self.weight]
        rows, grads = step.apart(x).flatten(1), step.apart(g).reshape(step.m, -1, g.shape[-1])
        if self.padding is not None:
            grads = grads * (rows != self.padding).unsqueeze(-1)
        table = g.new_zeros(step.m, *w.shape[-2:])
        table.scatter_add_(1, rows.unsqueeze(-1).expand_as(grads), grads)
        step.sink.add(self.weight, table)
        return None


@dataclass(frozen=True)
class Attention:
    """Self-attention of `nn.MultiheadAttention`: softmax(Q K' / sqrt(e / h)) V between two linear layers.

    x [m b, l, e], or [l, m b, e] where the module puts the batch second; h heads.
    """

    module: nn.MultiheadAttention
    inner: Linear
    outer: Linear

    def __call__(self, step: Step, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """(output, no weights). Errors: `ValueError` for what the check before a run then refuses."""
        mask, causal = options.pop("attn_mask", None), options.pop("is_causal", False)
        if key is not query or value is not query or options.pop("key_padding_mask", None) is not None:
            raise ValueError("attention between different sequences, or with a padding mask")
        x = query if self.module.batch_first else query.transpose(0, 1)
        heads, drop = self.module.num_heads, self.module.dropout if self.module.training else 0.0
        q, k, v = call(self.inner, step, x).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if causal:
            mask = None
        elif mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # here True takes part, in the module it is left out
        mixed = F.scaled_dot_product_attention(q, k, v, mask, drop, causal)
        y = call(self.outer, step, mixed.transpose(1, 2).flatten(2))
        return (y if self.module.batch_first else y.transpose(0, 1)), None


def layer_of(module: nn.Module, name: str) -> Run | None:
    """How a module with weights runs for a block of clients; None for modules that are not known."""
    prefix = f"{name}." if name else ""
    bias = f"{prefix}bias" if getattr(module, "bias", None) is not None else None
    weight = f"{prefix}weight"
    if type(module) is nn.Linear:
        return partial(call, Linear(weight, bias))
    if (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and type(module) in (nn.Conv1d, nn.Conv2d)  # a subclass may do something else
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        n = len(module.kernel_size)
        options = (module.stride, module.padding, module.dilation, False, (0,) * n, module.groups)
        return partial(call, Conv(weight, bias, options))
    if type(module) is nn.LayerNorm and module.elementwise_affine:
        layer_norm, scale = module, Norm(weight, bias, False)
        return lambda step, x: call(scale, step, F.layer_norm(x, layer_norm.normalized_shape, None, None, layer_norm.eps))
    if type(module) is nn.GroupNorm and module.affine:
        group_norm, gain = module, Norm(weight, bias, True)
        return lambda step, x: call(gain, step, F.group_norm(x, group_norm.num_groups, None, None, group_norm.eps))
    if type(module) is nn.Embedding and module.max_norm is None and not module.sparse and not module.scale_grad_by_freq:
        return partial(call, Embedding(weight, module.padding_idx))
    if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.bias_k is None:
        if module.add_zero_attn:
            return None
        biases = ("in_proj_bias", "out_proj.bias") if module.in_proj_bias is not None else (None, None)
        inner, outer = (b and prefix + b for b in biases)
        return Attention(module, Linear(f"{prefix}in_proj_weight", inner), Linear(f"{prefix}out_proj.weight", outer))
    return None


def adapter_of(module: nn.Module, name: str) -> tuple[Run, frozenset[str]] | None:
    """How a linear layer with one low-rank adapter (as peft makes it) runs, and what is trained of it; None for others."""
    base, factors = getattr(module, "base_layer", None), getattr(module, "lora_A", None)
    active: Any = getattr(module, "active_adapters", ())
    if type(base) is not nn.Linear or not factors or len(active) != 1 or getattr(module, "merged", False):
        return None
    key = active[0]
    parts: Any = module
    a, b, dropout = parts.lora_A[key], parts.lora_B[key], parts.lora_dropout[key]
    plain = type(a) is type(b) is nn.Linear and a.bias is None and b.bias is None and type(dropout) is nn.Identity
    free = not base.weight.requires_grad and a.weight.requires_grad and b.weight.requires_grad
    if not plain or not free or any(getattr(module, "use_dora", {}).values()):
        return None
    left, right = (f"{name}.{side}.{key}.weight" for side in ("lora_B", "lora_A"))
    return partial(call, Adapter(base, left, right, float(parts.scaling[key]))), frozenset((left, right))
