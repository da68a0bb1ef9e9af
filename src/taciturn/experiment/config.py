"""TOML <-> records. A part is a table with its `name` and its fields, or just its name: `codec = "cast"`.

The tables of parts are the exported names of the rooms, so a new part is known here as soon as its room exports it.
"""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from taciturn import aggregation, codecs, participation, partition, precision, server, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import ConfigError, TaciturnError, unknown
from taciturn.core.price import Price
from taciturn.core.types import Codec, Solver
from taciturn.experiment.experiment import Experiment, StopAt
from taciturn.fleet import Fleet, Profile
from taciturn.method import Method
from taciturn.solvers import schedules
from taciturn.sync import thresholds
from taciturn.tasks import data, models
from taciturn.tasks.spec import TaskSpec

Part = Callable[..., Any]
RECORDS: dict[str, type] = {
    **{"method": Method, "broadcast": Broadcast, "price": Price, "stop_at": StopAt},
    **{"fleet": Fleet, "profiles": Profile},  # profiles: a list of them
}
CUSTOM = "custom"


def _exported(room: Any, having: str = "") -> dict[str, Part]:
    parts = {name: getattr(room, name) for name in room.__all__}
    return {name: part for name, part in parts.items() if not having or hasattr(part, having)}


PARTS: dict[str, dict[str, Part]] = {
    "partition": _exported(partition),
    "participation": _exported(participation),
    "sync": _exported(sync),
    "theta": _exported(thresholds),
    "solver": _exported(solvers),
    "schedule": _exported(schedules),
    "codec": _exported(codecs),
    "aggregator": _exported(aggregation),
    "server": _exported(server),
    "precision": _exported(precision),
    "data": _exported(data, "load"),
    "split": _exported(data, "assign"),
    "model": _exported(models),
}


def fields_of(part: Part) -> dict[str, Any]:
    """The names and types of the arguments of a part or record."""
    hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
    if dataclasses.is_dataclass(part):
        hints = typing.get_type_hints(part)
        return {field.name: hints[field.name] for field in dataclasses.fields(part) if field.init}
    return {name: hints.get(name, Any) for name in inspect.signature(part).parameters}


# field -> the table of parts that it takes its value from: that of its name, or by its type that of codecs or solvers
KINDS = {name: name for name in PARTS} | {
    name: kind
    for kind, protocol in {"codec": Codec, "solver": Solver}.items()
    for part in PARTS[kind].values()
    for name, hint in fields_of(part).items()
    if hint is protocol
}


# ------------------------------------------------------------------------------------------------ records -> table


def to_table(experiment: Experiment) -> dict[str, Any]:
    """An experiment as the nested table that `from_table` reads. Parts of your own appear as name = "custom"."""
    table = {
        f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment) if f.name not in ("task", "method")
    }
    task = experiment.task
    spec = isinstance(task, TaskSpec)
    sources = {"data": task.data, "model": task.model} if spec else {"data": None, "model": None}
    plain = {name: _plain(name, value) for name, value in table.items()}
    plain |= {name: _plain(name, value) if spec else {"name": CUSTOM} for name, value in sources.items()}
    plain["method"] = _plain("method", experiment.method)
    return {name: value for name, value in plain.items() if value is not None}


def _plain(kind: str, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = {f.name: _plain(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        table = {name: item for name, item in table.items() if item is not None}
        if kind in RECORDS:
            return table
        name = type(value).__name__
        if PARTS.get(KINDS.get(kind, ""), {}).get(name) is not type(value):
            return {"name": CUSTOM, "class": f"{type(value).__module__}.{name}"}
        return {"name": name, **table}
    if isinstance(value, (list, tuple)):
        return [_plain(kind, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"name": CUSTOM, "class": getattr(value, "__qualname__", type(value).__name__)}


def to_toml(experiment: Experiment) -> str:
    """An experiment as TOML, every field written out."""
    return tomli_w.dumps(to_table(experiment))


# ------------------------------------------------------------------------------------------------ table -> records


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a file. Errors: `ConfigError` naming the file, and the line where TOML is broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def read_experiment(path: Path) -> dict[str, Any]:
    """The table of an experiment's file; its outline is found from where the file lies. Errors: as `read_toml`."""
    table = read_toml(path)
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("outline"), str):
        data["outline"] = str(path.resolve().parent / Path(data["outline"]).expanduser())
    return table


def outline_of(experiment: Experiment) -> Path | None:
    """The file on which sites agreed that have only their own data; None: all data are in one place."""
    told = getattr(getattr(experiment.task, "data", None), "outline", None)
    return Path(told).expanduser() if isinstance(told, str) else None


def from_table(table: Mapping[str, Any]) -> Experiment:
    """The experiment of a table. Errors: `ConfigError` / `UnknownName` naming the path of the value."""
    rest = dict(table)
    for needed in ("data", "model"):
        if needed not in rest:
            raise ConfigError(f"{needed}: the table [{needed}] is missing; for example {needed} = {_example(needed)!r}")
    task = TaskSpec(build_part("data", rest.pop("data"), "data"), build_part("model", rest.pop("model"), "model"))
    if str(rest.get("fleet", "")).endswith(".toml"):  # its numbers become part of the configuration
        rest["fleet"] = _plain("fleet", read_fleet(rest["fleet"]))
    known = {name: hint for name, hint in fields_of(Experiment).items() if name != "task"}
    experiment: Experiment = _call(lambda **fields: Experiment(task, **fields), known, rest, "")
    return experiment


def read_fleet(path: str | Path) -> Fleet:
    """The fleet of a TOML file: its [fleet], as in an experiment. Errors: `ConfigError` with the file and the place."""
    table = read_toml(Path(path))
    if not isinstance(table.get("fleet"), Mapping):
        raise ConfigError(f"{path}: a fleet is a list of [[fleet.profiles]]; there is none in this file")
    try:
        fleet: Fleet = _record("fleet", table["fleet"], "fleet")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return fleet


def fleet_toml(fleet: Fleet) -> str:
    """A fleet as TOML that `read_fleet` reads, and that can stand in the file of an experiment."""
    return tomli_w.dumps({"fleet": _plain("fleet", fleet)})


def _example(kind: str) -> str:
    return {"data": "digits", "model": "mlp"}[kind]


def build_part(kind: str, value: Any, path: str) -> Any:
    """A part from its table or its name."""
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: a table with a name, or a name; got {value!r}")
    rest = dict(table)
    name = rest.pop("name", None)
    if name is None:
        raise ConfigError(f"{path}: `name` is missing; allowed: {', '.join(sorted(PARTS[kind]))}")
    if name == CUSTOM:
        raise ConfigError(f"{path}: this part was given in Python ({rest.get('class', 'an object')}); run it from Python")
    if name not in PARTS[kind]:
        raise unknown(kind, name, PARTS[kind], path)
    part = PARTS[kind][name]
    return _call(part, fields_of(part), rest, path)


def _call(part: Part, known: Mapping[str, Any], table: Mapping[str, Any], path: str) -> Any:
    arguments = {}
    for name, value in table.items():
        place = f"{path}.{name}" if path else name
        if name not in known:
            raise unknown("field", name, known, path)
        if name in RECORDS and isinstance(value, Mapping):
            arguments[name] = _record(name, value, place)
        elif name in RECORDS and isinstance(value, list):
            arguments[name] = tuple(_record(name, one, f"{place}[{number}]") for number, one in enumerate(value))
        elif name in KINDS:
            arguments[name] = build_part(KINDS[name], value, place)
        else:
            arguments[name] = _value(known[name], value, place)
    try:
        return part(**arguments)
    except TaciturnError as error:
        raise ConfigError(f"{path + ': ' if path and not str(error).startswith(path) else ''}{error}") from error
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).split(') ', 1)[-1].split('() ', 1)[-1]}") from error


def _record(name: str, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: a table with the fields of {RECORDS[name].__name__}; got {value!r}")
    return _call(RECORDS[name], fields_of(RECORDS[name]), value, path)


def _value(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        allowed = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
        raise ConfigError(f"{path}: got {value!r}. {allowed}") from error


# ----------------------------------------------------------------------------------------------------- --set a.b=c


def parse_setting(text: str) -> tuple[str, Any]:
    """ "method.solver.lr=0.1" -> (path, value); what is not TOML is a string. Errors: `ConfigError`."""
    path, sign, raw = text.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"--set {text}: write path=value, for example method.solver.lr=0.05")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return path.strip(), value


def set_path(table: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The table with one value changed. A step that is not there is looked for further down: data.alpha = data.split.alpha.

    Setting a part by name gives it its defaults. Errors: `UnknownName` with the nearest names; `ConfigError` if the name
    stands in several places.
    """
    steps = path.split(".")
    node: Any = table
    walked: list[str] = []
    for number, wanted in enumerate(steps):
        last = number == len(steps) - 1
        if not isinstance(node, dict):
            raise ConfigError(f"{path}: {'.'.join(walked)} is {node!r}, not a table")
        for name in _route(node, wanted, walked, last):
            walked.append(name)
            if last and name == wanted:
                node[name] = value
                break
            if name in KINDS and isinstance(node[name], str):
                node[name] = {"name": node[name]}
            node = node[name]
    return table


def _route(node: dict[str, Any], wanted: str, walked: list[str], last: bool) -> list[str]:
    """The names from this table to the wanted one."""
    if wanted in node:
        return [wanted]
    kind = walked[-1] if walked else ""
    part = PARTS.get(KINDS.get(kind, ""), {}).get(node.get("name", ""), RECORDS.get(kind, None if walked else Experiment))
    allowed = fields_of(part) if part is not None else {}
    if last and wanted in allowed:
        return [wanted]
    routes = list(_search(node, wanted))
    if len(routes) == 1:
        return routes[0]
    where = ".".join(walked)
    if routes:
        raise ConfigError(f"{where}: {wanted!r} stands in several places: {', '.join('.'.join(r) for r in routes)}")
    raise unknown("field", wanted, {*node, *allowed} - {"task"}, where)


def _search(node: dict[str, Any], wanted: str) -> typing.Iterator[list[str]]:
    for name, child in node.items():
        if isinstance(child, dict):
            if wanted in child:
                yield [name, wanted]
            else:
                yield from ([name, *route] for route in _search(child, wanted))
