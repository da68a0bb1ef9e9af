"""What a run gives back.

Units: bytes up and down without evaluation; seconds of wall time, and simulated ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from taciturn.core.errors import RunError
from taciturn.core.state import write_atomic
from taciturn.experiment import deployment
from taciturn.experiment.deployment import Exported
from taciturn.experiment.experiment import DTYPES, Experiment
from taciturn.experiment.record import read_header, read_lines
from taciturn.precision.fake import deployed
from taciturn.tasks.built import BuiltTask


def worst_decile(values: list[float], goal: str) -> float | None:
    """Mean over the max(1, ceil(n / 10)) worst clients.

    >>> worst_decile([0.1 * i for i in range(1, 11)], "max")
    0.1
    """
    if not values:
        return None
    count = max(1, -(-len(values) // 10))
    return sum(sorted(values, reverse=goal == "min")[:count]) / count


def summarize(header: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last known figures of a run: metric, loss, worst decile of clients, bytes, rounds, seconds, simulated ones.

    Where the method's precision has bits also "{metric}_deployed", of the model with weights of so few bits (the fewest of
    its modes); None where the metric is measured on the clients' own data.
    """
    name, goal = header["metric"]["name"], header["metric"]["goal"]
    last = lines[-1] if lines else {}
    measured: dict[str, float] = next((line["metrics"] for line in reversed(lines) if line.get("metrics")), {})
    spread = next((line["spread"] for line in reversed(lines) if line.get("spread")), None)
    deployed: dict[str, float] = next((line["deployed"] for line in reversed(lines) if line.get("deployed")), {})
    return {
        "name": header["name"],
        **measured,
        **({f"{name}_deployed": deployed.get(name)} if header.get("deployed_bits") else {}),
        "metric": name,
        "worst_decile": worst_decile(spread[name], goal) if spread else None,
        "bytes_up": last.get("bytes_up", 0),
        "bytes_down": last.get("bytes_down", 0),
        "bytes_evaluate": last.get("bytes_evaluate", 0),
        "rounds": len(lines),
        "seconds": round(last.get("seconds", 0.0), 3),
        "simulated_seconds": last.get("simulated", {}).get("total", 0.0),
        "left_out": sum(len(line["left_out"]) for line in lines),
        **{name: value for name, value in last.get("privacy", {}).items() if "epsilon" in name or name == "delta"},
    }


@dataclass(frozen=True)
class Result:
    """A finished (or stopped) run.

    history: one dict a round, as in record.jsonl. tensors: the named parameters of the shared model, personal ones at
    their start values. `client(name)` gives a client's own model. stopped: why the run ended.
    """

    header: dict[str, Any]
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    stopped: str
    folder: Path | None = None
    _task: BuiltTask | None = field(default=None, repr=False)
    _client: Callable[[str], dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """The last known figures: metric, worst decile, bytes, rounds, seconds."""
        return summarize(self.header, self.history)

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation of the leading metrics."""
        return next((line["metrics"] for line in reversed(self.history) if line.get("metrics")), {})

    @property
    def bytes_up(self) -> int:
        """Bytes from clients to the server."""
        return int(self.history[-1]["bytes_up"]) if self.history else 0

    @property
    def bytes_down(self) -> int:
        """Bytes from the server to clients."""
        return int(self.history[-1]["bytes_down"]) if self.history else 0

    @property
    def model(self) -> nn.Module:
        """The trained model, in evaluation mode. Errors: `RunError` for a result that was loaded without its task."""
        return self._built.model_with(self.tensors)

    @property
    def _built(self) -> BuiltTask:
        if self._task is None:
            raise RunError(
                "this result was loaded from a folder without its task; load it with the experiment, load(folder, "
                "experiment), or load its tensors: model.load_state_dict(result.tensors)"
            )
        return self._task

    def quantized(self, bits: int) -> nn.Module:
        """The model as it is deployed with so many bits a weight (precision/fake.py). Errors: as for `model`."""
        model = self.model
        model.load_state_dict(deployed(dict(model.named_parameters()), bits), strict=False)
        return model

    def client(self, name: str) -> nn.Module:
        """The model of one client: shared and personal parameters, which are read from the run folder where there is one.

        Errors: `RunError` as for `model`, and once the folder was resumed.
        """
        if self._task is None or self._client is None:
            raise RunError(
                "personal models live with a run's clients; this result was loaded from a folder: run(experiment, out = "
                "folder, resume = True) opens a finished run with its clients"
            )
        return self._task.model_with(self._client(name))

    def export(self, path: str | Path, format: str = "int8", bits: int = 8, client: str | None = None) -> Path:
        """Write the model, or that of one client, as a file in few bits that holds no code.

        format: "int8" (`precision.packed.load` reads it), "onnx", "onnx-int8", "onnx-int8-dynamic"; bits: 2 to 8, of every
        weight with 16 features on both sides. Errors: as for `model`, `client` and `deployment.export`.
        """
        model = self.model if client is None else self.client(client)
        return deployment.export(self._built, model, path, format, bits)

    def measure(
        self, bits: int = 8, client: str | None = None, formats: Sequence[str] | None = None, patience: float = 0.5
    ) -> list[Exported]:
        """Bytes, metrics on the test data and latency on one thread of the float32 model and of each format.

        patience: seconds of timing for each, in turns. formats: None: all whose packages are there. Errors: as `export`;
        `DataError` without test data.
        """
        model = self.model if client is None else self.client(client)
        return deployment.measure(self._built, model, bits, client, formats, patience)

    def save(self, folder: str | Path) -> Path:
        """Write header, history and tensors to a folder that `load` reads."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {folder}: {error.strerror}") from error
        write_atomic(folder / "record.jsonl", [json.dumps(line).encode() + b"\n" for line in self.history])
        write_atomic(folder / "run.json", [json.dumps(self.header, indent=1).encode()])
        self.save_model(folder)
        return folder

    def save_model(self, folder: Path) -> None:
        """Write model.safetensors and result.json."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        write_atomic(folder / "model.safetensors", [save(tensors)])
        done = self.summary | {"stopped": self.stopped}
        write_atomic(folder / "result.json", [json.dumps(done, indent=1).encode()])


def load(folder: str | Path, experiment: Experiment | None = None) -> Result:
    """The result in a run folder, or one that `Result.save` wrote; with its experiment it also has `model` and `export`.

    Errors: `RunError` where the folder cannot be read, or holds another model than the experiment has.
    """
    folder = Path(folder)
    header = read_header(folder)
    try:
        tensors = load_file(folder / "model.safetensors")
        stopped = json.loads((folder / "result.json").read_text())["stopped"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder} holds a run that has not ended: {error}; resume it") from error
    result = Result(header, read_lines(folder), tensors, stopped, folder)
    if experiment is None:
        return result
    task = experiment.task.build(experiment.seed, "cpu", DTYPES[experiment.dtype], experiment.method.partition.prepare)
    wanted = {name: tuple(t.shape) for name, t in task.model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    differ = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differ:
        raise RunError(
            f"{folder} holds another model than this experiment has: {', '.join(differ[:3])} differ; give the experiment "
            "that was run (config.toml)"
        )
    return replace(result, _task=task)
