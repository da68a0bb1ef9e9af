"""taciturn ls | show | run | compare | advise | report | export | profile | deploy.

Exit codes: 0 done; 1 the run failed (its last checkpoint is kept); 2 wrong input (a name, a value, data, a model);
3 the run folder cannot be used (locked, another version, disk full); 130 interrupted (resume with --resume).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.markup import escape
from rich.table import Table

from taciturn.advisor import STUDIES, parse_bytes
from taciturn.advisor import advise as advise_on
from taciturn.advisor import show as show_advice
from taciturn.cli.common import Data, Progressing, Settings, Source, err, experiment_of, out, print_summary
from taciturn.cli.deploy import sites
from taciturn.compare import LINEUP, chosen, compare, parse_vary
from taciturn.compare.shown import comparison, progress
from taciturn.core.errors import AllClientsFailed, ConfigError, RunError, TaciturnError, unknown
from taciturn.core.state import write_atomic
from taciturn.experiment import config
from taciturn.experiment.deployment import FORMATS, Exported
from taciturn.experiment.preview import preview
from taciturn.experiment.recipes import RECIPES, check_data
from taciturn.experiment.record import read_header
from taciturn.experiment.result import load
from taciturn.experiment.runner import Interrupted
from taciturn.experiment.runner import run as run_experiment
from taciturn.experiment.spelled import split_list
from taciturn.fleet import Fleet, Measured, Profile, measure
from taciturn.fleet.fleets import FLEETS, MBIT
from taciturn.fleet.machine import PATIENCE
from taciturn.fleet.profile import DTYPES
from taciturn.report import human_bytes, write_report, write_scalars

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(sites, name="deploy")


@app.command("ls")
def list_parts() -> None:
    """Recipes, parts and data."""
    catalogue: dict[str, dict[str, Any]] = {
        "recipe": RECIPES,
        "study": STUDIES,
        "method (taciturn compare --methods)": LINEUP,
        "fleet (--set fleet=NAME, or FILE.toml)": FLEETS,
    }
    for head, entries in catalogue.items():
        table = Table(head, "what it is", box=None, header_style="bold")
        for name, entry in entries.items():
            said = "One profile, the reference device." if entry is Fleet else entry.__doc__ or ""
            table.add_row(name, said.split("\n")[0])
        out.print(table)
        out.print()
    parts = Table("field", r"parts (TOML: \[method.FIELD] name = ..)", box=None, header_style="bold")
    for kind, names in config.PARTS.items():
        parts.add_row(kind, ", ".join(names))
    out.print(parts)


@app.command()
def show(source: Source, settings: Settings = None, data: Data = "") -> None:
    """The TOML of a recipe, every field written out."""
    sys.stdout.write(config.to_toml(experiment_of(source, settings, data)))


@app.command()
def run(
    source: Annotated[str, typer.Argument(help="a recipe, a study or a TOML file; not needed with --resume")] = "",
    settings: Settings = None,
    data: Data = "",
    engine: Annotated[str | None, typer.Option(help="auto, sequential, loopback, stacked or ray")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds in all")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="rounds between two checkpoints")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="run folder (default: runs/NAME-SEED)")] = None,
    resume: Annotated[Path | None, typer.Option(help="run folder to go on with")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line instead of a progress bar")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="sizes, bytes, memory and time; no training")] = False,
) -> None:
    """Train a recipe or a TOML file, with any value changed; or run a study."""
    changes = {"engine": engine, "rounds": rounds, "seed": seed, "checkpoint_every": checkpoint_every}
    if source in STUDIES:
        given = {"data": data or None, "resume": resume, "dry_run": dry_run or None} | changes | {"seed": None}
        _study(source, settings, {name for name, value in given.items() if value is not None}, seed, folder, as_json)
        return
    if resume is not None:
        read_header(resume)
        experiment = experiment_of(str(resume / "config.toml"), settings, data, **changes)
    else:
        experiment = experiment_of(source, settings, data, **changes)
    check_data(experiment, source)
    if dry_run:
        _print_preview(preview(experiment), as_json)
        return
    place = resume or folder or _fresh(Path("runs") / f"{experiment.name}-{experiment.seed}")
    try:
        with Progressing(experiment, as_json) as callback:
            result = run_experiment(experiment, out=place, resume=resume is not None, callbacks=(callback,))
    except Interrupted as stop:
        message = f"interrupted after round {len(stop.result.history)}; go on with: taciturn run --resume {place}"
        err.print(escape(message), soft_wrap=True)
        raise typer.Exit(130) from stop
    summary = result.summary | {"stopped": result.stopped, "folder": str(place)}
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def _study(
    name: str, settings: list[str] | None, unfit: set[str], seed: int | None, folder: Path | None, as_json: bool
) -> None:
    """A study of the advisor: it takes --set, --seed, --out and --json."""
    if unfit:
        options = ", ".join(sorted(f"--{option.replace('_', '-')}" for option in unfit))
        raise ConfigError(f"{name} is a study and takes --set, --seed, --out and --json; got {options}")
    values = dict(config.parse_setting(text) for text in settings or []) | ({} if seed is None else {"seed": seed})
    place = folder or _fresh(Path("runs") / f"{name}-{values.get('seed', 0)}", "study.json")
    summary = STUDIES[name](place, values, lambda line: None if as_json else err.print(escape(line), soft_wrap=True))
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def _fresh(path: Path, holds: str = "run.json") -> Path:
    """runs/NAME-SEED, or the first runs/NAME-SEED.K that is free."""
    number, place = 1, path
    while (place / holds).exists():
        number += 1
        place = path.with_name(f"{path.name}.{number}")
    return place


@app.command("compare")
def compare_methods(
    source: Source,
    vary: Annotated[list[str] | None, typer.Option(help="path=value,value: method.* makes methods, else scenarios")] = None,
    methods: Annotated[str, typer.Option(help="of the line-up (taciturn ls): lean,fedadam,.. or all")] = "",
    seeds: Annotated[int, typer.Option(help="runs of each, with other seeds")] = 3,
    rounds: Annotated[int | None, typer.Option(help="rounds of each run")] = None,
    tune: Annotated[str, typer.Option(help="a setting, or setting=value,value: the best for each method")] = "",
    target: Annotated[float | None, typer.Option(help="level to reach (default: 0.98 of the first's best)")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="begin no run after so many minutes")] = None,
    processes: Annotated[int | None, typer.Option(help="runs at once (default: one a core)")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="default: runs/compare-NAME; the same goes on")] = None,
    settings: Settings = None,
    data: Data = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line instead of a table")] = False,
) -> None:
    """Run methods side by side on one task: a table, a report, and files of both."""
    experiment = experiment_of(source, settings, data, rounds=rounds)
    check_data(experiment, source)
    place = folder or Path("runs") / f"compare-{experiment.name}"
    tables, settings_of, unfit = chosen(experiment, split_list(methods)) if methods else (None, None, {})
    for name, why in unfit.items():
        err.print(escape(f"{name} is left out: {why}"), soft_wrap=True)
    with progress(err, as_json) as told:
        outcome = compare(
            config.to_table(experiment),
            [parse_vary(text) for text in vary or []],
            methods=tables,
            tune=(parse_vary(tune, "--tune") if "=" in tune else tune) or settings_of,
            out=place,
            seeds=seeds,
            target=target,
            budget_minutes=budget_minutes,
            processes=processes,
            told=told,
        )
    if as_json:
        print(json.dumps({"rows": outcome.rows, "missing": outcome.missing}))
        return
    out.print(comparison(outcome.rows))
    for gap in outcome.missing:
        err.print(escape(f"{gap['run']}: {gap['why']}"), soft_wrap=True)
    out.print(escape(str(place / "report.html")), soft_wrap=True)


@app.command()
def advise(
    source: Source,
    budget: Annotated[str, typer.Option(help="bytes that all clients together may send up, for example 20MB")] = "",
    link: Annotated[float | None, typer.Option(help="Mbit/s of a client's link, each way: rank by time")] = None,
    latency: Annotated[float, typer.Option(help="milliseconds a round, with --link")] = 0.0,
    codecs: Annotated[str, typer.Option(help="codecs to compare: quantize8,rand_k(share=0.25),..")] = "",
    pilot: Annotated[int | None, typer.Option(help="rounds of the pilot")] = None,
    part: Annotated[str, typer.Option(help="of the method: codec,sync,rank,personal,precision,lean (default: all)")] = "",
    fleet: Annotated[str, typer.Option(help="devices and lines: a name (taciturn ls) or FILE.toml")] = "",
    settings: Settings = None,
    data: Data = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line instead of a table")] = False,
) -> None:
    """What suits this task, from a short pilot run: codec, sync, rank, personal layers, precision; or plain FedAvg."""
    experiment = experiment_of(source, settings, data, fleet=fleet or None)
    check_data(experiment, source)
    spent = parse_bytes(budget) if budget else None
    names = split_list(codecs) if codecs else None
    line: dict[str, Any] = {"mbit": link, "latency": latency / 1000}
    advice = advise_on(experiment, codecs=names, budget=spent, pilot_rounds=pilot, parts=split_list(part) or None, **line)
    if as_json:
        print(json.dumps(advice.table()))
    else:
        out.print(show_advice(advice))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders; the first is the baseline")],
    page: Annotated[Path, typer.Option("-o", "--out", help="the HTML file")] = Path("report.html"),
    target: Annotated[float | None, typer.Option(help="level of the metric to reach")] = None,
    tables: Annotated[Path | None, typer.Option(help="folder for its tables as Markdown and CSV")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="folder for its curves as TensorBoard's event files")] = None,
) -> None:
    """One self-contained HTML page from run folders, in English and Japanese."""
    if tensorboard is not None:
        write_scalars(folders, tensorboard)
    out.print(escape(str(write_report(folders, page, target, tables))), soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="the folder of a finished run")],
    format: Annotated[str, typer.Option(help=" or ".join(FORMATS) + "; with --measure: all")] = "",
    bits: Annotated[int, typer.Option(help="2 to 8, of every weight with 16 features on both sides")] = 8,
    file: Annotated[Path | None, typer.Option("--out", help="file to write (default: in the run's folder)")] = None,
    client: Annotated[str | None, typer.Option(help="the personal model of this client")] = None,
    compare: Annotated[bool, typer.Option("--measure", help="bytes, metrics, latency beside float32")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line instead of text")] = False,
) -> None:
    """The trained model in few bits, for where it will run."""
    if not format and (file is not None or not compare):
        raise ConfigError(f"export: --format is missing; allowed: {', '.join(FORMATS)}")
    if format and format not in FORMATS:
        raise unknown("format", format, FORMATS, "export")
    load(folder)  # refuses what has not ended
    experiment = config.from_table(config.read_toml(folder / "config.toml"))
    if client is None:
        result = load(folder, experiment)
    else:  # opens the clients' rows; the first round is behind it, so nothing is trained
        result = run_experiment(experiment.replace(rounds=1), out=folder, resume=True)
    told: dict[str, Any] = {}
    if format:
        place = file or folder / f"model-{format}{'' if format == 'onnx' else f'-{bits}'}{FORMATS[format].suffix}"
        told = {"file": str(result.export(place, format, bits, client)), "bytes": place.stat().st_size}
    rows = result.measure(bits, client, [format] if format else None) if compare else []
    if as_json:
        print(json.dumps(told | ({"measured": [asdict(row) for row in rows]} if rows else {})))
        return
    if told:
        out.print(escape(f"{told['file']}: {human_bytes(told['bytes'])}"), soft_wrap=True)
    if rows:
        _print_formats(rows)


@app.command()
def profile(
    file: Annotated[Path | None, typer.Option("--out", help="TOML file to write; else it is printed")] = None,
    name: Annotated[str, typer.Option(help="what to call this machine")] = "measured",
    up: Annotated[float, typer.Option(help="Mbit/s of its line, up: not measured")] = Profile().up / MBIT,
    down: Annotated[float, typer.Option(help="Mbit/s of its line, down: not measured")] = Profile().down / MBIT,
    latency: Annotated[float, typer.Option(help="milliseconds of a round trip: not measured")] = 1000 * Profile().latency,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    patience: Annotated[float, typer.Option(help="seconds for each of twelve figures")] = PATIENCE,
) -> None:
    """Measure this machine: a profile for `fleet`, with the line that you name."""
    line = Profile(name, up=up * MBIT, down=down * MBIT, latency=latency / 1000)
    found = measure(device, patience)
    text = config.fleet_toml(Fleet((found.profile(line),)))
    if file is None:
        sys.stdout.write(text)
        return
    try:
        write_atomic(file, [text.encode()])
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error
    _print_measured(found)
    out.print(escape(f"{file}: use it with --set fleet={file}"), soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------ output


def _print_measured(found: Measured) -> None:
    sizes = sorted({n for _, n in found.gemm})
    table = Table("GFLOP/s", *(f"n = {n}" for n in sizes), box=None, header_style="bold")
    for dtype in DTYPES:
        rates = (found.gemm[dtype, n] for n in sizes)
        table.add_row(dtype, *("-" if rate is None else f"{rate:.1f}" for rate in rates))
    out.print(table)
    copies = ", ".join(f"{found.copy[size]:.1f} GB/s ({human_bytes(size)})" for size in sorted(found.copy))
    out.print(f"copy {copies}; an operator {1e6 * found.launch:.2f} microseconds; {torch.get_num_threads()} threads")


def _print_formats(rows: list[Exported]) -> None:
    names, batch = list(rows[0].metrics), rows[0].batch
    table = Table("format", "bytes", *names, "ms a sample", f"ms for {batch}", box=None, header_style="bold")
    for row in rows:
        values = (f"{row.metrics[name]:.4f}" for name in names)
        table.add_row(row.format, human_bytes(row.bytes), *values, f"{1000 * row.one:.3f}", f"{1000 * row.many:.3f}")
    out.print(table)


def _print_preview(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        print_summary(facts)


def _fail(error: TaciturnError) -> NoReturn:
    err.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True)
    sys.exit(1 if isinstance(error, AllClientsFailed) else 3 if isinstance(error, RunError) else 2)


def main() -> None:
    """The command."""
    try:
        app()
    except TaciturnError as error:
        _fail(error)
