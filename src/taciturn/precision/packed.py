"""A quantized model as one safetensors file, and its linear layers in 8-bit arithmetic on a CPU.

    y_r = s_r s_x sum_j k_rj (a_j - z) + bias_r,   x_j ~ s_x (a_j - z)

The codes k and scales s of core/rounding.py in place of every weight that they apply to, all else in float32. A linear
layer then quantizes its input as it comes, with one scale and zero point for the batch, to 7 bits: products of 8 with 8
bits overflow the 16-bit sums of CPUs without VNNI. Nothing in the file is code: names, shapes, bytes. The kernel is torch's
(`quantized::linear_dynamic`); where a build of torch has none, the weights are dequantized when they are loaded.

Symbols: w [o, i, ..]; k int8, for 4 bits and fewer two a byte; s [o] float32; a input codes 0 .. 127, z their zero point.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from taciturn.core.errors import ModelError, RunError, require
from taciturn.core.rounding import applies, codes, levels
from taciturn.core.state import write_atomic

FORMAT = "taciturn.packed.1"
CODES, SCALE = ".codes", ".scale"


def nibbles(k: Tensor) -> Tensor:
    """Codes of -8 .. 7 [..] -> bytes [(n + 1) // 2], the first of two in the low half.

    >>> nibbles(torch.tensor([1, -1, 3], dtype=torch.int8)).tolist()
    [241, 3]
    """
    low = F.pad(k.flatten(), (0, k.numel() % 2)).view(torch.uint8) & 15
    return low[0::2] | (low[1::2] << 4)


def from_nibbles(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, to int8 of that shape.

    >>> from_nibbles(torch.tensor([241, 3], dtype=torch.uint8), torch.Size([3])).tolist()
    [1, -1, 3]
    """
    both = torch.stack([packed & 15, packed >> 4], 1).flatten()[: shape.numel()].to(torch.int8)
    return torch.where(both > 7, both - 16, both).view(shape)


def save(model: nn.Module, path: str | Path, bits: int = 8) -> Path:
    """Write the model with b = 2 to 8 bits a weight, as `precision.fake.deployed` has them. Errors: `ConfigError`."""
    require(2 <= bits <= 8, f"export.bits: 2 to 8; got {bits}")
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        w = parameter.detach().float().cpu()
        if applies(w.shape):
            k, scale = codes(w, bits)
            tensors |= {name + CODES: nibbles(k) if bits <= 4 else k.contiguous(), name + SCALE: scale}
        else:
            tensors[name] = w.contiguous()
    tensors |= {name: _plain(buffer) for name, buffer in _kept(model).items()}
    write_atomic(Path(path), [to_bytes(tensors, {"format": FORMAT, "bits": json.dumps(bits)})])
    return Path(path)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The model of a file that `save` wrote: a copy of `model`, which gives its shape, in evaluation mode, on the CPU.

    Errors: `RunError` for a file that is not one; `ModelError` where model and file differ.
    """
    tensors, bits = _read(Path(path))
    made, quantized = copy.deepcopy(model).float().cpu().eval(), set[str]()
    wanted = dict(made.named_parameters()) | _kept(made)
    with torch.no_grad():
        for name, target in wanted.items():
            if name + CODES in tensors:
                k, scale = _codes(tensors, name, target.shape, bits, path)
                target.copy_(k * scale.view(-1, *[1] * (k.dim() - 1)))
                tensors |= {name + CODES: k}
                quantized.add(name)
            elif name in tensors and tensors[name].shape == target.shape:
                target.copy_(tensors[name])
            else:
                found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
                raise ModelError(f"{path}: {name} {list(target.shape)} of this model {found} in the file; give its model")
    known = {key for name in wanted for key in ((name + CODES, name + SCALE) if name in quantized else (name,))}
    if strange := sorted(tensors.keys() - known):
        raise ModelError(f"{path}: this model has no {', '.join(strange[:3])}, which the file has; give its model")
    return _with_kernels(made, tensors, quantized)


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    try:
        with safe_open(path, "pt") as file:
            meta: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if meta.get("format") != FORMAT or meta.get("bits", "") not in [str(bits) for bits in range(2, 9)]:
        raise RunError(
            f"{path}: format {meta.get('format')!r} with {meta.get('bits')!r} bits; a model that was exported as int8 has "
            f"format {FORMAT!r} and 2 to 8 bits"
        )
    return tensors, int(meta["bits"])


def _codes(tensors: dict[str, Tensor], name: str, shape: torch.Size, bits: int, path: str | Path) -> tuple[Tensor, Tensor]:
    """Of one weight, checked: shapes, types, and codes within the levels."""
    k, scale = tensors[name + CODES], tensors.get(name + SCALE)
    halves = bits <= 4
    kind, size = (torch.uint8, ((shape.numel() + 1) // 2,)) if halves else (torch.int8, tuple(shape))
    fits = k.dtype == kind and tuple(k.shape) == size and applies(shape)
    if not fits or scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != (shape[0],):
        raise ModelError(
            f"{path}: {name} of this model is {list(shape)}; its codes in the file have {list(k.shape)} ({k.dtype}), "
            f"its scales {None if scale is None else list(scale.shape)}; give the model that was exported"
        )
    k = from_nibbles(k, shape) if halves else k
    if int(k.abs().max()) > levels(bits) or int(k.min()) == -128 or not bool(torch.isfinite(scale).all()):
        raise RunError(f"{path}: {name} holds codes beyond {bits} bits, or scales that are not finite")
    return k, scale


class Int8Linear(nn.Module):
    """x [.., i] -> [.., o] with k [o, i] int8 and s [o]: inputs to 7 bits as they come, sums of integers."""

    def __init__(self, k: Tensor, scale: Tensor, bias: Tensor | None, packed: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = k.shape
        self.register_buffer("codes", k)
        self.register_buffer("scale", scale)
        self.bias, self._packed = bias, packed

    @property
    def weight(self) -> Tensor:
        """Q(w) [o, i] float32, for modules that read it."""
        return self.codes * self.scale.unsqueeze(1)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """[.., i] -> [.., o]."""
        found: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self._packed, True)
        return found


def _with_kernels(model: nn.Module, tensors: dict[str, Tensor], quantized: set[str]) -> nn.Module:
    """The model with `Int8Linear` for its linear layers that were quantized, where torch has the kernel."""
    for name, module in list(model.named_modules()):
        weight = f"{name}.weight".lstrip(".")
        if type(module) is not nn.Linear or weight not in quantized:
            continue
        k, scale = tensors[weight + CODES], tensors[weight + SCALE]
        packed = _packed(k, scale, module.bias)
        if packed is None:
            continue
        layer = Int8Linear(k, scale, module.bias, packed).eval()
        if not name:
            return layer
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, layer)
    return model


def _packed(k: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """The weight in the layout of torch's kernel, or None. Its quantized tensors are deprecated, and used here only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            zero = torch.zeros(len(scale), dtype=torch.int64)
            weight = torch.quantize_per_channel(k * scale.unsqueeze(1), scale, zero, 0, torch.qint8)
            if not torch.equal(weight.int_repr(), k):
                return None
            packed = torch.ops.quantized.linear_prepack(weight, None if bias is None else bias.detach())
            torch.ops.quantized.linear_dynamic(torch.zeros(1, k.shape[1]), packed, True)
        except (RuntimeError, AttributeError):
            return None
    return packed


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds."""
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _plain(buffer: Tensor) -> Tensor:
    found = buffer.detach().cpu().contiguous()
    return found.float() if found.is_floating_point() else found
