"""What a computation is made of: every operator that torch runs, with its flops and the bytes it moves.

A layer's forward and backward are operators like any other, so this is the count of whatever a step really does: frozen
layers have no gradient of their weight, two gradients are counted twice. Not counted: views, and operators on integers
alone (sample numbers, keys of draws), which are the simulation's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from taciturn.fleet.profile import Dtype, Operator

_ATEN = torch.ops.aten
_LOOKED_UP = {_ATEN.embedding, _ATEN.index, _ATEN.index_select, _ATEN.gather}  # read as much as they give
_HALF = (torch.bfloat16, torch.float16)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = grad.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_FLOPS: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch counts those of other devices only
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[Dtype, int, int]] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to say so to torch.compile would cost the seconds of importing it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        given, made = list(_tensors((args, kwargs))), list(_tensors(out))
        floats = [t.dtype for t in given + made if t.is_floating_point()]
        if not view and floats:
            packet = func._overloadpacket
            torchs = flop_registry.get(packet)
            flops = torchs(*args, **kwargs, out_val=out) if torchs else _FLOPS.get(packet, _none)(*args, **kwargs)
            read = sum(map(_bytes, made if packet in _LOOKED_UP else given))
            dtype: Dtype = "bfloat16" if floats[-1] in _HALF else "float32"
            self.found[dtype, int(flops), read + sum(map(_bytes, made))] += 1
        return out


def _none(*_: Any, **__: Any) -> int:
    return 0


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """As a device would hold it: in single precision, where the run checks itself in double."""
    size = tensor.element_size()
    return tensor.numel() * (min(size, 4) if tensor.is_floating_point() else size)


def count(run: Callable[[], object]) -> tuple[Operator, ...]:
    """Run it once -> its operators, equal ones together, in an order of their own.

    >>> a = torch.ones(4, 8)
    >>> count(lambda: a @ a.T)
    (Operator(dtype='float32', flops=256, bytes=320, times=1),)
    """
    with _Counting() as counting:
        run()
    return tuple(Operator(dtype, flops, moved, times) for (dtype, flops, moved), times in sorted(counting.found.items()))
