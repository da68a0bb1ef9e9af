"""The trained model as a file for where it will run, and what that file is worth.

    bytes of the file;  metrics on the run's test data;  median seconds of one sample, and of a batch, on one thread

Formats: "int8": precision/packed.py; "onnx": float32; "onnx-int8": weights in b bits, the numbers of `Result.quantized(b)`;
"onnx-int8-dynamic": its linear layers compute with integers (precision/graph.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from taciturn.core.errors import DataError, ModelError, require, unknown
from taciturn.core.types import Batch
from taciturn.precision import graph, packed
from taciturn.tasks.built import BuiltTask

Inputs = tuple[Tensor, ...]
Call = Callable[..., Any]  # as the model is called
AT_ONCE = 1024  # samples
BATCH = 32  # samples whose latency is measured
FLOAT = "float32"  # the model in torch, which the others are compared with


@dataclass(frozen=True, slots=True)
class Format:
    """save(model, inputs, path, bits); open(path, model) gives what is called like the model."""

    suffix: str
    save: Callable[[nn.Module, Inputs, Path, int], Path]
    open: Callable[[Path, nn.Module], Call]


def _onnx(save: Callable[[nn.Module, Inputs, Path, int], Path]) -> Format:
    return Format(".onnx", save, lambda path, model: graph.session(path))


FORMATS = {
    "int8": Format(".safetensors", lambda model, inputs, path, bits: packed.save(model, path, bits), packed.load),
    "onnx": _onnx(lambda model, inputs, path, bits: graph.save(model, inputs, path)),
    "onnx-int8": _onnx(lambda model, inputs, path, bits: graph.save(model, inputs, path, bits)),
    "onnx-int8-dynamic": _onnx(lambda model, inputs, path, bits: graph.save(model, inputs, path, bits, dynamic=True)),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """Of one format: bytes of its file, metrics, median seconds of one sample and of `batch` samples."""

    format: str
    bytes: int
    metrics: dict[str, float]
    one: float
    many: float
    batch: int


def export(task: BuiltTask, model: nn.Module, path: str | Path, format: str, bits: int) -> Path:
    """Write the model. bits: 2 to 8, of every weight with 16 features on both sides ("onnx": none). Errors: `UnknownName`
    for a format; `ConfigError` for bits, and without the packages of `taciturn[export]`; `ModelError`; `RunError`.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS, "export")
    require(2 <= bits <= 8, f"export.bits: 2 to 8; got {bits}")
    return FORMATS[format].save(model, arguments(task, model, _example(task, 2)), Path(path), bits)


def measure(
    task: BuiltTask, model: nn.Module, bits: int, client: str | None, formats: Sequence[str] | None, patience: float
) -> list[Exported]:
    """The float32 model and the formats (None: all that can be written here), side by side. client: whose data; None: the
    server's test set, else all clients' own. patience: seconds of timing for each. Errors: as for `export`; `DataError`.
    """
    if formats is None:
        formats = [name for name, one in FORMATS.items() if one.suffix != ".onnx" or graph.available()]
    model = model.float().cpu().eval()
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    calls: dict[str, Call] = {FLOAT: model}
    sizes = {FLOAT: len(to_bytes(state))}
    with TemporaryDirectory() as folder:
        for name in formats:
            path = export(task, model, Path(folder) / name, name, bits)
            sizes[name], calls[name] = path.stat().st_size, FORMATS[name].open(path, model)
        times = {size: _latency(task, model, calls, size, patience) for size in (1, BATCH)}
        found = {name: metrics(task, call, client) for name, call in calls.items()}
    return [Exported(n, sizes[n], found[n], times[1][n], times[BATCH][n], BATCH) for n in calls]


def metrics(task: BuiltTask, call: Call, client: str | None = None) -> dict[str, float]:
    """What is called like the model -> {"accuracy": .., "loss": ..}. client: as in `measure`."""
    total: dict[str, float] = {}
    for batch in _samples(task, client):
        with torch.no_grad():
            output = task.program.forward(call, batch)
        output = output.to(task.program.dtype) if isinstance(output, Tensor) else output
        for name, value in task.sums(output, batch).items():
            total[name] = total.get(name, 0.0) + float(value)
    return task.pool(total)


def arguments(task: BuiltTask, model: Call, batch: Batch) -> Inputs:
    """What the task calls the model with, for this batch. Errors: `ModelError` unless it is tensors, once, by place."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def spy(*args: Any, **named: Any) -> Any:
        seen.append((args, named))
        return model(*args, **named)

    with torch.no_grad():
        task.program.forward(spy, batch)
    if len(seen) != 1 or seen[0][1] or not all(isinstance(one, Tensor) for one in seen[0][0]):
        raise ModelError(
            "export: task.forward must call the model once, with tensors by place, model(a, b); it called it "
            f"{len(seen)} times" + (f", with {', '.join(seen[0][1])} by name" if seen and seen[0][1] else "")
        )
    return seen[0][0]


def _example(task: BuiltTask, count: int) -> Batch:
    """Training samples of the largest client, the first ones again where it has fewer."""
    largest = task.train.sizes.argmax().reshape(1)
    index = torch.arange(count).remainder(int(task.train.sizes.max())).unsqueeze(0)
    return _plain(task.train.fetch(largest, index))


def _plain(fetched: Batch) -> Batch:
    """A client's samples [1, b, ..] -> [b, ..] on the CPU, floats in float32."""
    batch = {name: t[0].cpu() for name, t in fetched.items()}
    batch = {name: t.float() if t.is_floating_point() else t for name, t in batch.items()}
    return batch | {"mask": torch.ones(len(next(iter(batch.values()))), dtype=torch.bool)}


def _samples(task: BuiltTask, client: str | None) -> Iterator[Batch]:
    central = task.data.central if client is None else None
    data = central or task.held_out("test")
    owners = range(len(data.sizes)) if client is None else [list(task.train.names).index(client)]
    if not any(int(data.sizes[i]) for i in owners):
        raise DataError(f"export: {client or 'nobody'} holds test samples to measure on; hold some out (test = 0.2)")
    for i in owners:
        for index in torch.split(torch.arange(int(data.sizes[i])), task.at_once(AT_ONCE)):
            if len(index):
                yield _plain(data.fetch(torch.tensor([i]), index.unsqueeze(0)))


def _latency(task: BuiltTask, model: nn.Module, calls: dict[str, Call], size: int, patience: float) -> dict[str, float]:
    """Median seconds of each, called in turns, so that a busy machine slows all alike."""
    inputs = arguments(task, model, _example(task, size))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    with _one_thread(), torch.no_grad():
        for call in calls.values():
            call(*inputs)
        end = time.perf_counter() + patience * len(calls)
        while time.perf_counter() < end or len(spent[FLOAT]) < 3:
            for name, call in calls.items():
                began = time.perf_counter()
                call(*inputs)
                spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in spent.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
