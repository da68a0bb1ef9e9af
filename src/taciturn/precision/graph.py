"""A model as an ONNX file, in float32 or with quantized weights. The one door to onnx and onnxruntime.

    W = DequantizeLinear(k, s, axis = 0)                                    weights: int8, or int4 for b <= 4
    y = MatMulInteger(a, k' + 128) s_x s + bias,  a, s_x, z = DynamicQuantizeLinear(x)       dynamic: linear layers

k and s are those of core/rounding.py, so a runtime computes in float32 with exactly Q_b(W); dynamic linear layers compute
with 8-bit integers on both sides instead. Codes are moved by 128 there: of two unsigned factors no sum overflows on CPUs
without VNNI, where those of signed and unsigned ones do.

Symbols: W [o, i, ..]; k codes; s [o] float32; k' [i, o]; a uint8 codes of the input x, s_x its scale, z its zero point.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taciturn.core.errors import ConfigError, ModelError, RunError
from taciturn.core.rounding import applies, codes, levels
from taciturn.core.state import write_atomic
from taciturn.precision.fake import deployed
from taciturn.precision.packed import nibbles

OPSET = 21  # the first with int4 and scales by axis for it
MIDDLE = 128  # of unsigned codes


def _package(name: str) -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ConfigError(f"export to ONNX needs {error.name}: pip install 'taciturn[export]'") from error
    return {"onnx": onnx, "onnxruntime": onnxruntime, "onnxscript": onnxscript}[name]


def available() -> bool:
    """True if the packages of `taciturn[export]` are there."""
    try:
        _package("onnx")
    except ConfigError:
        return False
    return True


def save(model: nn.Module, inputs: Sequence[Tensor], path: str | Path, bits: int = 0, dynamic: bool = False) -> Path:
    """Write the model that is called as model(*inputs); the first axis of every input and of the output is the batch's.

    bits: 2 to 8 of the weights that `applies` says yes to, as `precision.fake.deployed` has them; 0: float32. dynamic:
    linear layers of quantized weights compute with integers, of 8 bits whatever bits says. Errors: `ConfigError` without
    onnx, onnxruntime and onnxscript; `ModelError` for a model that torch cannot export.
    """
    onnx = _package("onnx")
    levels(bits)
    made = copy.deepcopy(model).float().cpu().eval()
    weights = {name: p.detach().clone() for name, p in made.named_parameters(remove_duplicate=False)}
    made.load_state_dict(deployed(weights, bits), strict=False)
    proto = _exported(made, tuple(x.float() if x.is_floating_point() else x for x in inputs))
    if bits:
        shapes = {one.name: tuple(one.dims) for one in proto.graph.initializer}
        for name, weight in weights.items():
            if applies(weight.shape) and shapes.get(name) == tuple(weight.shape):
                _quantize(proto.graph, name, *codes(weight, bits), bits, dynamic)
    _tidy(proto.graph)
    try:
        onnx.checker.check_model(proto)
        content = proto.SerializeToString()
    except ValueError as error:
        raise ModelError(f"export: an ONNX file holds at most 2 GiB: {error}") from error
    write_atomic(Path(path), [content])
    return Path(path)


def session(path: str | Path, threads: int = 1) -> Callable[..., Tensor]:
    """The model of an ONNX file on the CPU, by onnxruntime: tensors -> its first output.

    Weights in few bits are dequantized once, when it is opened (onnxruntime would do it at every call). Errors: `RunError`
    for a file that is not one.
    """
    ort = _package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise RunError(f"cannot open {path} as ONNX: {str(error).splitlines()[0]}") from error
    names = [one.name for one in opened.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        given = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(opened.run(None, given)[0])

    return call


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """torch's exporter without its optimizations: they fold weights into others, and we look for weights by name."""
    batch = torch.export.Dim("batch", min=1)
    names = ["input"] if len(inputs) == 1 else [f"input_{place}" for place in range(len(inputs))]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, inputs, dynamo=True, optimize=False, opset_version=OPSET, verbose=False, external_data=False,
                dynamic_shapes=tuple({0: batch} for _ in inputs), input_names=names, output_names=["output"],
            )  # fmt: skip
    except Exception as error:  # whatever a user's model meets in torch.export
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f'export: torch cannot write this model as ONNX: {why[0]}; format = "int8" takes any model'
        ) from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and hints about itself."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _quantize(graph: Any, name: str, k: Tensor, scale: Tensor, bits: int, dynamic: bool) -> None:
    """Codes and scales in place of one initializer; who multiplies with it dynamically does so, the others dequantize."""
    onnx = _package("onnx")
    float_weight = next(one for one in graph.initializer if one.name == name)
    graph.initializer.remove(float_weight)
    add = graph.initializer.append
    add(onnx.numpy_helper.from_array(scale.numpy(), f"{name}.scale"))
    if dynamic and k.dim() == 2:
        for node in _products(graph, name):
            _make_dynamic(graph, node, name)
    if any(f"{name}.turned" in node.input for node in graph.node):
        turned = (k.mT.to(torch.int16) + MIDDLE).to(torch.uint8).contiguous()
        add(onnx.numpy_helper.from_array(turned.numpy(), f"{name}.turned"))
        if not any(one.name == "codes.middle" for one in graph.initializer):
            add(onnx.helper.make_tensor("codes.middle", onnx.TensorProto.UINT8, [], [MIDDLE]))
    if any(name in node.input for node in graph.node):
        if bits <= 4:
            raw = bytes(nibbles(k).tolist())
            add(onnx.helper.make_tensor(f"{name}.codes", onnx.TensorProto.INT4, list(k.shape), raw, raw=True))
        else:
            add(onnx.numpy_helper.from_array(k.numpy(), f"{name}.codes"))
        inputs = [f"{name}.codes", f"{name}.scale"]
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", inputs, [name], axis=0))


def _products(graph: Any, name: str) -> list[Any]:
    """Nodes that compute x W' (+ bias): a Gemm, or the MatMul of a Transpose."""
    turned = {
        node.output[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] == name and _attributes(node).get("perm") == [1, 0]
    }
    found = []
    for node in graph.node:
        given = _attributes(node)
        plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
        gemm = node.op_type == "Gemm" and node.input[1] == name and given.get("transB") and plain
        if gemm or (node.op_type == "MatMul" and node.input[1] in turned and node.input[0] not in turned):
            found.append(node)
    return found


def _attributes(node: Any) -> dict[str, Any]:
    helper = _package("onnx").helper
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _make_dynamic(graph: Any, node: Any, name: str) -> None:
    """Quantize the input, multiply integers, scale, and add the bias, in place of one product."""
    make = _package("onnx").helper.make_node
    x, out, bias = node.input[0], node.output[0], [one for one in node.input[2:] if one]
    a, x_scale, zero = (f"{out}.{part}" for part in ("codes", "scale", "zero"))
    steps = [
        make("DynamicQuantizeLinear", [x], [a, x_scale, zero]),
        make("MatMulInteger", [a, f"{name}.turned", zero, "codes.middle"], [f"{out}.sums"]),
        make("Cast", [f"{out}.sums"], [f"{out}.float"], to=1),
        make("Mul", [x_scale, f"{name}.scale"], [f"{out}.step"]),
        make("Mul", [f"{out}.float", f"{out}.step"], [f"{out}.product" if bias else out]),
        *([make("Add", [f"{out}.product", bias[0]], [out])] if bias else []),
    ]
    place = list(graph.node).index(node)
    graph.node.remove(node)
    for step in reversed(steps):
        graph.node.insert(place, step)


def _tidy(graph: Any) -> None:
    """Take out what nobody uses any more, and where in whose files the exporter saw each node: paths of this machine."""
    for one in [graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output]:
        one.ClearField("metadata_props")
        one.ClearField("doc_string")
    del graph.value_info[:]
    while True:
        used = {name for node in graph.node for name in node.input} | {one.name for one in graph.output}
        idle = [node for node in graph.node if not used & set(node.output)]
        for node in idle:
            graph.node.remove(node)
        if not idle:
            break
    for one in [one for one in graph.initializer if one.name not in used]:
        graph.initializer.remove(one)
