"""taciturn deploy outline | init | up | status | desk | readmit | down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from taciturn.cli.common import Data, Progressing, Settings, experiment_of, out, print_summary
from taciturn.core.errors import ConfigError
from taciturn.core.state import write_atomic
from taciturn.experiment import deployed, federation
from taciturn.experiment.desk import serve as serve_desk
from taciturn.experiment.recipes import check_data
from taciturn.experiment.record import read_lines
from taciturn.experiment.result import load
from taciturn.tasks.data.files import part_of
from taciturn.tasks.data.outline import merged_text
from taciturn.tasks.spec import TaskSpec

sites = typer.Typer(no_args_is_help=True, help="Run an experiment over Flower: outline | init | up | status | ..")

Recipe = Annotated[str, typer.Option("--recipe", help="a recipe (taciturn ls) or a TOML file")]
Place = Annotated[Path, typer.Argument(help="folder of the federation")]


@sites.command()
def outline(
    files: Annotated[list[Path], typer.Argument(help="the TOML; with --merge the parts of sites 0, 1, .. in this order")],
    merge: Annotated[bool, typer.Option("--merge", help="parts of all sites -> the outline")] = False,
    to: Annotated[Path | None, typer.Option("-o", "--out", help="part.json, or with --merge outline.json")] = None,
    settings: Settings = None,
    data: Data = "",
) -> None:
    """What sites that have only their own data agree on before a run: sizes, columns, categories, classes, means; no
    sample. At each site its part, from its own files; anywhere the merged outline, for data.outline of the TOML.
    """
    if merge:
        target, text, what = to or Path("outline.json"), merged_text(files), "the outline of all; give it to every party"
    else:
        if len(files) != 1:
            raise ConfigError(f"one TOML file; got {len(files)} files; parts are merged with --merge")
        experiment = experiment_of(str(files[0]), settings, data)
        if not isinstance(experiment.task, TaskSpec):
            raise ConfigError(f"{files[0]}: an outline needs [data] with data.folder or data.table")
        target, what = to or Path("part.json"), "this site's part: counts and sums, read it before you give it away"
        text = part_of(experiment.task.data, experiment.seed)
    write_atomic(target, [text.encode()])
    out.print(escape(f"{target}: {what}"), soft_wrap=True)


@sites.command()
def init(
    place: Place = Path("deploy"),
    source: Recipe = "quickstart",
    nodes: Annotated[int, typer.Option(help="sites")] = 2,
    hosts: Annotated[
        str, typer.Option(help="names and addresses of the server, for its certificate")
    ] = "localhost,127.0.0.1",
    port: Annotated[int, typer.Option(help="of the server")] = 8000,
    rounds: Annotated[int | None, typer.Option(help="rounds in all")] = None,
    settings: Settings = None,
    data: Data = "",
) -> None:
    """Write the Flower app with the experiment's TOML, a certificate for the server, a key for each site that has sent
    none (keys/node-K.pub), and how `flwr` reaches the server.
    """
    experiment = experiment_of(source, settings, data, rounds=rounds)
    deployed.check_deployable(experiment, nodes)
    place = place.resolve()
    federation.make_keys(place / "keys", nodes, hosts.split(","))
    federation.connect(place / "home", f"{hosts.split(',')[0]}:{port}", place / "keys")
    deployed.bundle(experiment, place / "app", **{"out": str(place / "run"), "min-available-nodes": nodes})
    keys = f"{place / 'keys'}: node-K to site K only, ca.crt to all"
    out.print(escape(f"{place / 'app'}: what is run; {keys}; {place / 'home'}: for FLWR_HOME"), soft_wrap=True)


@sites.command()
def up(
    place: Place = Path("deploy"),
    source: Recipe = "quickstart",
    nodes: Annotated[int, typer.Option(help="SuperNodes; client i is at node i mod this")] = 2,
    rounds: Annotated[int | None, typer.Option(help="rounds in all")] = None,
    deadline: Annotated[float, typer.Option(help="seconds after which a round goes on without who is late")] = 600.0,
    settings: Settings = None,
    data: Data = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line instead of progress")] = False,
) -> None:
    """Start SuperLink and SuperNodes here with TLS and node keys, run, clean up. A run that the folder holds goes on."""
    place = place.resolve()
    experiment = experiment_of(source, settings, data, rounds=rounds)
    check_data(experiment, source)
    deployed.check_deployable(experiment, nodes)
    told = {"out": str(place / "run"), "deadline": deadline, "min-available-nodes": nodes}
    deployed.bundle(experiment, place / "app", **told)
    with federation.Federation(place, nodes) as held, Progressing(experiment, as_json) as callback:
        held.run(place / "app", place / "run", callback)
    result = load(place / "run")
    summary = result.summary | {"stopped": result.stopped, "folder": str(place / "run")}
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


@sites.command()
def status(place: Place = Path("deploy")) -> None:
    """Which processes of a federation run, and how far its run is."""
    rows = {name: f"process {pid}" for name, pid in federation.alive(place.resolve()).items()}
    lines = read_lines(place / "run") if (place / "run" / "record.jsonl").exists() else []
    print_summary(rows | {"rounds": len(lines)})


@sites.command()
def desk(state: Annotated[Path, typer.Argument(help="the node's state-dir")]) -> None:
    """Keep a node's experiment loaded, so that its answers need not wait for torch to be imported; until it is ended."""
    serve_desk(state, deployed.at_node)


@sites.command()
def readmit(
    run: Annotated[Path, typer.Argument(help="the server's run folder; its run must not be going on")],
    client: Annotated[str, typer.Argument(help="the client whose site lost its disk, as the record names it")],
    data: Data = "",
) -> None:
    """Let a client begin anew whose site lost what it kept; then submit the run again."""
    done = deployed.readmit(experiment_of(str(run / "config.toml"), None, data), run, client)
    out.print(escape(f"{client} begins anew in round {done + 1}; submit the run again"), soft_wrap=True)


@sites.command()
def down(place: Place = Path("deploy")) -> None:
    """End the processes of a federation that was left behind."""
    ended = federation.end_all(place.resolve())
    out.print(escape(", ".join(ended) or "nothing runs"), soft_wrap=True)
