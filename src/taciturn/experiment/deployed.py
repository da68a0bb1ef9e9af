"""An experiment as a Flower app: the bundle that is shipped, what its server runs, and what its nodes answer.

The bundle holds the experiment's TOML as it was simulated, and two short Python files. Run config: `out` (the server's run
folder; a run that is there goes on), `deadline` (seconds of a round), `min-available-nodes`. Node config: `partition-id`,
`num-partitions`, `state-dir` (what the node's clients keep), and where needed `data-path` in place of data.path. Where
sites have only their own data, the bundle holds the outline on which they agreed (tasks/data/outline.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomli_w
import torch

from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ConfigError, DataError, RunError, require
from taciturn.core.state import write_atomic
from taciturn.core.types import SyncRule
from taciturn.engines import flower
from taciturn.engines.letters import Letter, failed, order_of, order_text
from taciturn.engines.site import Site, answer
from taciturn.engines.sites import SECONDS, Sites
from taciturn.experiment.allocation import facts_of
from taciturn.experiment.config import from_table, outline_of, read_experiment, set_path, to_table, to_toml
from taciturn.experiment.experiment import DTYPES, Experiment
from taciturn.experiment.record import MAY_DIFFER, RunFolder
from taciturn.experiment.runner import prepare, restore, run
from taciturn.tasks.built import BuiltTask
from taciturn.tasks.data.outline import LOCAL, content

TOML, OUTLINE = "experiment.toml", "outline.json"
SETTINGS: dict[str, Any] = {"out": "run", "deadline": SECONDS, "min-available-nodes": 2}
ELSEWHERE = ("engine", "block", "keep_gib", "device", "fleet")  # fields that change no bit of a deployed run
SERVER = '''"""The server's half of the experiment beside this file, as a Flower app."""

from taciturn.experiment.deployed import server_app

server = server_app(__file__)
'''
CLIENT = Path(__file__).with_name("client_app.txt")  # a program that does not import taciturn
LICENSE = "The experiment and its data belong to those who run it. The library is under the Apache License 2.0.\n"


def fingerprint(experiment: Experiment) -> str:
    """Of all that must be the same at the server and at a site."""
    table = {k: v for k, v in to_table(experiment).items() if k not in (*MAY_DIFFER, *ELSEWHERE)}
    data = {name: value for name, value in table.pop("data").items() if name not in LOCAL}
    if (path := outline_of(experiment)) is not None:
        data["outline"] = content(path)
    return hashlib.sha256(json.dumps([table, data], sort_keys=True).encode()).hexdigest()[:16]


def bundle(experiment: Experiment, folder: Path, **settings: Any) -> Path:
    """Write the Flower app of an experiment. settings: of the run config. Errors: `ConfigError` for parts of your own."""
    from_table(to_table(experiment))  # parts of one's own cannot be shipped as TOML
    folder.mkdir(parents=True, exist_ok=True)
    project = {
        "project": {
            "name": "taciturn-app",
            "version": "1.0.0",
            "description": f"{experiment.name}, trained where the data are",
            "license": {"file": "LICENSE"},
            "dependencies": ["taciturn[flower]"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "taciturn",
                    "components": {"serverapp": "taciturn_server:server", "clientapp": "taciturn_client:client"},
                    "config": SETTINGS | settings,
                }
            }
        },
    }
    texts = {
        "pyproject.toml": tomli_w.dumps(project),
        "taciturn_server.py": SERVER,
        "taciturn_client.py": CLIENT.read_text(encoding="utf-8"),
        TOML: to_toml(experiment),
        "LICENSE": LICENSE,
    }
    if (path := outline_of(experiment)) is not None:
        content(path)  # an outline that cannot be read is said now
        texts |= {TOML: to_toml(with_outline(experiment, Path(OUTLINE))), OUTLINE: path.read_text(encoding="utf-8")}
    for name, text in texts.items():
        write_atomic(folder / name, [text.encode()])
    return folder


def with_outline(experiment: Experiment, path: Path) -> Experiment:
    """The same experiment, with its outline elsewhere."""
    table = to_table(experiment)
    table["data"]["outline"] = str(path)
    return from_table(table)


def _experiment(folder: Path, data_path: str = "") -> Experiment:
    table = read_experiment(folder / TOML)
    if data_path:
        set_path(table, "data.path", data_path)
    return from_table(table)


def site_of(experiment: Experiment, folder: Path) -> Site:
    """What the clients of a node share; folder: where they keep what is theirs."""
    method, seed = experiment.method.secret(), experiment.seed
    task = experiment.task.build(seed, experiment.device, DTYPES[experiment.dtype], method.partition.prepare)
    work = Work(task, method.split(task.model, task.tracked), method.solver, method.codec)
    absent = frozenset(i for i, name in enumerate(task.train.names) if name in set(task.data.absent))
    facts, homes = facts_of(method, task), task.data.homes
    return Site(work, method, random.key(seed), folder, fingerprint(experiment), facts, absent, homes)


@lru_cache(maxsize=4)
def _site(app: Path, state: str, data_path: str) -> Site:
    return site_of(_experiment(app, data_path), Path(state))


def serve(experiment: Experiment, line: flower.FlowerLine, settings: dict[str, Any]) -> None:
    """Run the experiment over a line; a run that the folder `out` holds goes on. What crossed is in `carried.json`."""
    settings = SETTINGS | settings
    out = Path(str(settings["out"])).expanduser().resolve()
    experiment = _keeping(experiment, out)
    line.least, name = int(settings["min-available-nodes"]), hashlib.sha256(str(out).encode()).hexdigest()[:8]
    made: list[Sites] = []

    def sites(work: Work, sync: SyncRule) -> Sites:
        mark = fingerprint(experiment)
        assert isinstance(work.task, BuiltTask)
        line.clients, line.homes = len(work.task.train.sizes), work.task.data.homes
        made.append(Sites(line, work, sync, name + mark, mark, float(settings["deadline"])))
        return made[-1]

    def say(line_: dict[str, Any]) -> None:
        lost = "".join(f"; client {i}: {why}" for i, why in made[-1].silent.items())
        print(f"taciturn: round {line_['round']} loss {line_['loss']:.4f}{lost}", file=sys.stderr, flush=True)

    began = time.monotonic()
    torch.set_num_threads(1)
    holds = RunFolder(out).holds_run()
    result = run(experiment.replace(engine="flower"), out=out, resume=holds, callbacks=(say,), sites=sites)
    facts = {"carried": made[-1].carried, "exchanges": made[-1].exchanges, "exchange_seconds": line.seconds}
    facts |= {"seconds": time.monotonic() - began, "nodes": len(line.nodes), "broken": line.broken}
    write_atomic(out / "carried.json", [json.dumps(facts, indent=1).encode()])
    print(f"taciturn: done, {len(result.history)} rounds", file=sys.stderr, flush=True)


def _keeping(experiment: Experiment, out: Path) -> Experiment:
    """The experiment with its outline in the run folder, where a run that goes on finds it, wherever the app lies then.

    Errors: `RunError` if the run began with another.
    """
    if (path := outline_of(experiment)) is None:
        return experiment
    kept = out / OUTLINE
    if kept.exists() and content(kept) != content(path):
        raise RunError(f"{out} began with another outline than {path}; choose another `out`, or give back that of {kept}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, [path.read_bytes()])
    return with_outline(experiment, kept)


def server_app(file: str) -> Any:
    """The server's app of the bundle that `file` is in."""
    folder = Path(file).resolve().parent
    return flower.server_app(lambda line, settings: serve(_experiment(folder), line, settings))


def at_node(told: dict[str, Any], letter: Letter) -> Letter:
    """Answer a letter at a node; told: "app", the folder of the bundle, and "node", the node config."""
    node = told["node"]
    for needed in ("partition-id", "num-partitions", "state-dir"):
        if needed not in node:
            return letter.reply(error=f"--node-config: {needed} is missing; got {sorted(node)}")
    which, of = int(node["partition-id"]), int(node["num-partitions"])
    torch.set_num_threads(1)
    try:
        site = _site(Path(told["app"]), str(node["state-dir"]), str(node.get("data-path", "")))
    except Exception as error:  # the user's data or model at this node
        return failed(letter, error)
    if not flower.at_home(letter.client, site.homes, which, of):
        return letter.reply(error=f"client {letter.client} is not at this node ({which} of {of})")
    return answer(site, letter)


def in_process(app: Path, node: dict[str, Any], letters: Sequence[tuple[int, str, list[bytes]]]) -> list[Any]:
    """What a client's file asks where no desk listens: (client, order, frames) of letters -> the same of answers."""
    told = {"app": str(app), "node": node}
    found = (at_node(told, Letter(i, order_of(text), tuple(frames))) for i, text, frames in letters)
    return [(letter.client, order_text(letter.order), list(letter.frames)) for letter in found]


def readmit(experiment: Experiment, out: Path, name: str) -> int:
    """A client of a run that stands still begins anew, for its site lost what it kept -> the round that is done.

    For the server it is from now on a client that was never drawn: the site is sent the whole model and begins with a fresh
    head, memory and optimizer, as a newcomer. Nothing that it sent counts again. Errors: `DataError` for a name;
    `ConfigError` where the server keeps a mean of what clients keep: the lost part could neither be taken out nor kept.
    """
    with RunFolder(out) as folder:
        if getattr(experiment.method.aggregator, "remembers", False):
            raise ConfigError(
                f"{experiment.name}: the server keeps a mean of what clients keep (aggregator "
                f"{type(experiment.method.aggregator).__name__}), in which {name} has a part that only its site knew; it "
                "cannot begin anew in this run. Leave it out, or begin a new run"
            )
        state = prepare(experiment, folder.header(), sites=lambda work, rule: Sites(Nowhere(), work, rule, "", ""))
        names = list(state.task.train.names)
        if name not in names:
            raise DataError(f"there is no client {name!r}; clients are {', '.join(names[:8])}")
        restore(state, folder)
        state.engine.clients.renew(torch.tensor([names.index(name)]))
        return state.server.round


class Nowhere:
    """A line to no site, for who looks at a run and does not go on with it."""

    def there(self) -> Sequence[int]:
        """Nobody."""
        return ()

    def place(self, client: int) -> int:
        """None."""
        return -1

    def exchange(self, letters: Sequence[Letter], seconds: float) -> Sequence[Letter]:
        """No answer."""
        return ()


def check_deployable(experiment: Experiment, nodes: int) -> None:
    """Errors: `ConfigError` for what a deployed run does not do."""
    require(nodes >= 1, f"--nodes: at least 1; got {nodes}")
    if experiment.deadline is not None:
        raise ConfigError("deadline: simulated seconds do not end a deployed round; use --deadline of `taciturn deploy up`")
