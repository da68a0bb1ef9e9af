"""The loop around the round: draw, round, evaluate, record, checkpoint; and how a run goes on after a crash.

Symbols: N clients; x [d] server model. Every draw is a function of (seed, round); what was measured (the engine's path)
is read from run.json on resume, so a resumed run ends in the same bits.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taciturn.client import Work
from taciturn.core import random
from taciturn.core.broadcast import renumbered
from taciturn.core.errors import AllClientsFailed, ConfigError, DataError, RunError
from taciturn.core.state import State, tree_map
from taciturn.core.types import Cast
from taciturn.core.vector import Kind
from taciturn.engines import LocalEngine, build
from taciturn.engines.modes import Path as EnginePath
from taciturn.experiment.allocation import allocated
from taciturn.experiment.central import Central
from taciturn.experiment.config import to_table, to_toml
from taciturn.experiment.experiment import DTYPES, Callback, Experiment
from taciturn.experiment.interrupts import interrupts
from taciturn.experiment.privacy import Budget, check
from taciturn.experiment.record import FORMAT, RunFolder, same_experiment
from taciturn.experiment.result import Result
from taciturn.experiment.simulated import Times
from taciturn.experiment.snapshot import server_of, server_record
from taciturn.method import Method, is_silent
from taciturn.precision.policies import deployed_bits, learns
from taciturn.round import RoundStats, ServerState, fed_round, start
from taciturn.tasks.built import BuiltTask

LISTED = 10_000  # clients whose names are in run.json; with more, each evaluation names its own


@dataclass
class _Run:
    """A run in progress: static parts first, then what moves from round to round. method: with a policy that is played."""

    experiment: Experiment
    method: Method
    task: BuiltTask
    work: Work
    engine: LocalEngine
    path: EnginePath
    key: Tensor
    times: Times
    server: ServerState
    central: Central | None
    budget: Budget
    history: list[dict[str, Any]]
    seconds: float = 0.0

    @property
    def from_clients(self) -> bool:
        """True if the leading metric is measured on the clients' own data."""
        return self.task.data.central is None or self.work.split.personal.d + self.work.split.buffers.d > 0

    def draw(self, round: int) -> tuple[Tensor, Tensor]:
        """The round's key, and its cohort, of those whose device can be reached."""
        key, there = random.fold(self.key, "round", round), self.engine.crew.there()
        reachable = self.times.clock.reachable(key)
        return key, self.method.participation.draw(round, key, reachable if there is None else reachable & there)


def prepare(experiment: Experiment, header: dict[str, Any] | None = None, **faults: Any) -> _Run:
    """Build task, split, engine and server; nothing is trained. header: of the run that is resumed."""
    method = experiment.method.secret() if experiment.engine == "flower" else experiment.method
    task = experiment.task.build(experiment.seed, experiment.device, DTYPES[experiment.dtype], method.partition.prepare)
    if experiment.engine != "flower" and (absent := task.data.absent):
        shown = ", ".join(absent[:8])
        raise DataError(
            f"the data of {len(absent)} clients are not here ({shown}); train them where they are: taciturn deploy"
        )
    split = method.split(task.model, task.tracked)
    work = Work(task, split, method.solver, method.codec)
    key = random.key(experiment.seed)
    name, block, least, keep = experiment.engine, experiment.block, None, int(experiment.keep_gib * 2**30)
    if header is not None:  # the path and the blocks were chosen when the run began
        name, block, least = (header["engine"].get(part) for part in ("name", "block", "least"))
    times = Times.of(experiment, work, key)
    method, facts = allocated(method, work, task, times, key)
    faults |= {"share": times.share} if experiment.deadline is not None else {}
    faults |= {"facts": facts, "seconds": times.arrivals if learns(method.precision) else None}
    engine, path = build(name, work, method, key, block=block, least=least, workers=experiment.workers, keep=keep, **faults)
    if header is not None and path.path != header["engine"]["path"]:
        raise RunError(
            f"the run began on the path {header['engine']['path']!r} and this machine takes {path.path!r} ({path.why}); "
            f"resume it with torch {header['versions']['torch']}, or start anew"
        )
    central = None if task.data.central is None else Central(task, work, task.data.central, keep)
    server = start(split.x0, task.train.sizes, method, split.base)
    budget = Budget(method, len(task.train.sizes))
    run = _Run(experiment, method, task, work, engine, path, key, times, server, central, budget, [])
    check(experiment, method, run.from_clients, path.block > 1)
    if run.from_clients:
        _evaluated_ids(run)  # an error now is better than one after training
    return run


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    **faults: Any,
) -> Result:
    """Run an experiment.

    out: the run folder; without it nothing is written. resume: go on from the folder's last checkpoint (rounds and
    stop_at may be larger now). callbacks get every line of the record; an exception in one ends the run.
    Errors: `ConfigError`, `DataError`, `ModelError` before training; `RunError` and `AllClientsFailed` during it.
    """
    if out is None:
        if resume:
            raise ConfigError("resume: needs the run folder, out = ..")
        state = prepare(experiment, **faults)
        return _loop(state, _header(state), None, callbacks)
    with RunFolder(Path(out)) as folder:
        if not resume:
            if folder.holds_run():
                raise RunError(f"{out} holds a run already; resume it (--resume {out}) or choose another folder")
            state = prepare(experiment, **faults)
            folder.create(_header(state), to_toml(experiment))
            state.engine.clients.create(folder.path)
            state.budget.restore([], folder.path)
            return _loop(state, folder.header(), folder, callbacks)
        header = folder.header()
        same_experiment(header["experiment"], to_table(experiment), folder.path)
        state = prepare(experiment, header, **faults)
        restore(state, folder)
        return _loop(state, header, folder, callbacks)


def _loop(run: _Run, header: dict[str, Any], folder: RunFolder | None, callbacks: Sequence[Callback]) -> Result:
    experiment, began = run.experiment, time.perf_counter() - run.seconds
    stopped = _stop_reason(run)
    with closing(run.engine.crew), interrupts() as interrupted:
        while not stopped:
            try:
                stats = _round(run)
            except AllClientsFailed as error:
                where = f"; the last good checkpoint is in {folder.path}" if folder and run.server.round else ""
                raise AllClientsFailed(f"{error}{where}") from error
            run.seconds = time.perf_counter() - began
            line = _line(run, stats, last=run.server.round == experiment.rounds)
            run.history.append(line)
            stopped = _stop_reason(run) or ("interrupted" if interrupted() else "")
            if folder is not None:
                folder.append(line)
                if stopped or run.server.round % experiment.checkpoint_every == 0:
                    folder.save(run.server.round, *_snapshot(run), run.engine.clients)
            for callback in callbacks:
                callback(line)
    result = _result(run, header, stopped, folder.path if folder else None)
    if folder is not None and stopped != "interrupted":
        result.save_model(folder.path)
    if stopped == "interrupted":
        raise Interrupted(result)
    return result


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the round in progress was finished and, with a run folder, a checkpoint written."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"stopped after round {len(result.history)}")
        self.result = result


def _round(run: _Run) -> RoundStats:
    key, ids = run.draw(run.server.round)
    sizes, split = run.task.train.sizes[ids], run.work.split
    run.budget.begin()
    run.server, stats = fed_round(run.server, ids, sizes, run.method, run.engine, split, key)
    run.budget.release(stats)
    return stats


def _stop_reason(run: _Run) -> str:
    """Why the run is over, or ""."""
    stop, last = run.experiment.stop_at, run.history[-1] if run.history else None
    if run.server.round >= run.experiment.rounds:
        return "rounds"
    if last is None:
        return ""
    metric, goal = _leading(run.task)
    value = (last["metrics"] or {}).get(metric)
    if stop.metric is not None and value is not None and (value >= stop.metric if goal == "max" else value <= stop.metric):
        return "metric"
    if stop.bytes is not None and last["bytes_up"] + last["bytes_down"] >= stop.bytes:
        return "bytes"
    return "seconds" if stop.seconds is not None and last["seconds"] >= stop.seconds else ""


# --------------------------------------------------------------------------------------------------------- evaluation


def _leading(task: BuiltTask) -> tuple[str, str]:
    return (task.metrics[0].name, task.metrics[0].goal) if task.metrics else ("loss", "min")


def _evaluated_ids(run: _Run) -> Tensor:
    """Clients that hold samples of the evaluated split, or `evaluate_count` of them: a draw of this round's own."""
    sizes, count = run.task.held_out(run.experiment.evaluate_on).sizes, run.experiment.evaluate_count
    ids = (sizes > 0).nonzero().squeeze(1)
    if count is None or count >= len(ids):
        return ids
    key = random.fold(run.key, "evaluate", run.server.round)
    return ids[random.choice(key, len(ids), count)].sort().values


def _cast(run: _Run) -> Cast:
    """The model as it would be broadcast now; the next round sends this very cast, unless an average is evaluated."""
    server, key = run.server, random.fold(random.fold(run.key, "round", run.server.round), "broadcast")
    broadcast, split = run.method.broadcast, run.work.split
    if server.model is not server.x:
        cast = broadcast.publish(server.model, server.round, None, split.layout, key, kinds=split.kinds)
        version = server.cast.version + 1 if server.cast else 0  # newer than what any client holds
        return renumbered(cast, version)
    cast = broadcast.publish(server.x, server.round, server.cast, split.layout, key, server.merges, split.kinds)
    run.server = replace(server, cast=cast)
    return cast


def _held(run: _Run) -> State:
    """The server's own model, and the base with all that it took."""
    base = {"base": _cast(run).held["base"]} if run.work.split.base.names else {}
    return {"x": run.server.model} | base


def _evaluate_clients(run: _Run) -> tuple[dict[str, float], dict[str, Any]]:
    """Pooled metrics over the clients, and each client's own."""
    ids = _evaluated_ids(run)
    sums = run.engine.evaluate(ids, _cast(run), run.experiment.evaluate_on)
    rows = [
        run.task.pool({n: float(v) for n, v in zip(sums, values, strict=True)})
        for values in zip(*sums.values(), strict=True)
    ]
    spread: dict[str, Any] = {"ids": ids.tolist(), "count": [int(n) for n in sums["count"]]}
    spread |= {name: [row[name] for row in rows] for name in rows[0]}
    names = run.task.train.names
    if len(names) > LISTED:
        spread["names"] = [names[i] for i in spread["ids"]]
    return run.task.pool({name: float(value.to(torch.float64).sum()) for name, value in sums.items()}), spread


def _line(run: _Run, stats: RoundStats, last: bool) -> dict[str, Any]:
    """Evaluate where it is due; -> the round's line of the record."""
    experiment, names = run.experiment, run.task.train.names
    done, metrics, spread, deployed, bits = run.server.round, None, None, None, deployed_bits(experiment.method.precision)
    due = last or done % experiment.evaluate_every == 0
    every = experiment.evaluate_clients_every
    asked = (last and not is_silent(run.method.codec)) or (every and done % every == 0)
    held_out = run.from_clients or getattr(run.task.data, experiment.evaluate_on, None) is not None
    if (due and run.from_clients) or (held_out and asked):
        metrics, spread = _evaluate_clients(run)
    if due and not run.from_clients:
        assert run.central is not None
        metrics = run.central(_held(run))
        deployed = run.central(_held(run), bits, experiment.method.precision.inputs) if bits else None
    before: dict[str, Any] = run.history[-1] if run.history else {"bytes_up": 0, "bytes_down": 0, "bytes_evaluate": 0}
    simulated = run.times.round(stats, run.engine.post.ledger, before.get("simulated", {}).get("total", 0.0))
    traffic = run.engine.post.ledger.close_round()
    evaluation = sum(e["payload"] + e["frame"] for k, e in traffic["by_kind"].items() if k.endswith("/evaluate"))
    spent = {way: sum(e["payload"] + e["frame"] for k, e in traffic["by_kind"].items()
                      if k.startswith(way) and not k.endswith("/evaluate")) for way in ("up", "down")}  # fmt: skip
    good = [loss for loss, i in zip(stats.loss.tolist(), stats.ids.tolist(), strict=True) if i not in stats.left_out]
    return (
        {
            "round": done,
            "loss": sum(good) / len(good),
            "seconds": run.seconds,
            "bytes_up": before["bytes_up"] + spent["up"],
            "bytes_down": before["bytes_down"] + spent["down"],
            "bytes_evaluate": before["bytes_evaluate"] + evaluation,
            "metrics": metrics,
            "spread": spread,
            "steps": float(stats.steps.to(torch.float64).mean()),
            "longest": int(stats.steps.max()),
            "sync": stats.sync,
            "aggregate": stats.aggregate,
            "cohort": stats.ids.tolist(),
            "simulated": simulated,
            "left_out": [{"client": names[i], "why": why} for i, why in stats.left_out.items()],
            "traffic": traffic,
        }
        | ({"knobs": stats.knobs} if stats.knobs else {})
        | ({"precision": stats.precision} if stats.precision else {})
        | ({"deployed": deployed} if bits else {})
        | run.budget.line()
    )


# ------------------------------------------------------------------------------------------------- header, checkpoint


def _header(run: _Run) -> dict[str, Any]:
    metric, goal = _leading(run.task)
    split, names, count = run.work.split, run.task.train.names, run.experiment.evaluate_count
    measured = f"the clients' {run.experiment.evaluate_on} data" + (f", {count} of them at a time" if count else "")
    return {
        "format": FORMAT,
        "name": run.experiment.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"taciturn": version("taciturn"), "torch": torch.__version__, "python": platform.python_version()},
        "experiment": to_table(run.experiment),
        "seed": run.experiment.seed,
        "engine": {name: getattr(run.path, name) for name in ("name", "path", "block", "least", "why")},
        "threads": torch.get_num_threads(),
        "randomness": run.task.facts.randomness,
        "layout": split.layout.fingerprint,
        "d": split.layout.d,
        "p": split.personal.d,
        "clients": list(names) if len(names) <= LISTED else [],
        "clients_total": len(names),
        "metric": {"name": metric, "goal": goal},
        "measured_on": measured if run.from_clients else "the server's test set",
        "target": run.experiment.target,
        "note": run.task.data.note,
        "deployed_bits": deployed_bits(run.experiment.method.precision),
        "fleet": run.times.facts(),
    }


def _snapshot(run: _Run) -> tuple[State, dict[str, Any]]:
    state, cast = server_record(run.server)
    meta = {
        "seconds": run.seconds,
        "totals": run.engine.post.ledger.totals,
        "layout": run.work.split.layout.fingerprint,
    }
    return state | {"engine": run.engine.export()}, meta | cast


def restore(run: _Run, folder: RunFolder) -> None:
    """Take up a folder's newest checkpoint."""
    found = folder.load()
    if found is None:
        run.budget.restore(folder.lines(0), folder.path)
        run.engine.clients.create(folder.path)
        return
    state, meta = found
    state = tree_map(lambda tensor: tensor.to(run.server.x.device), state)
    if meta["layout"] != run.work.split.layout.fingerprint:
        raise RunError(f"{folder.path}: the checkpoint is of another model (names or shapes of its parameters differ)")
    run.server = server_of(state, meta)
    run.engine.clients.recover(folder.path, meta["round"])
    run.engine.restore(state["engine"])
    run.engine.post.ledger.totals = meta["totals"]
    run.history = folder.lines(meta["round"])
    run.budget.restore(run.history, folder.path)
    run.seconds = meta["seconds"]


def _result(run: _Run, header: dict[str, Any], stopped: str, folder: Path | None) -> Result:
    split, held = run.work.split, _held(run)
    names = run.task.train.names

    def tensors(x: Tensor, v: Tensor, b: Tensor) -> dict[str, Tensor]:
        views = split.layout.views(x), split.personal.views(v), split.buffers.views(b)
        return {**run.task.model.state_dict(), **run.work.params(held, *views)}

    def client(name: str) -> dict[str, Tensor]:
        if name not in names:
            raise DataError(f"there is no client {name!r}")
        if run.engine.clients.moved_on():
            raise RunError(f"{folder} was resumed, and its clients have moved on; ask the result of the resumed run")
        i = torch.tensor([names.index(name)])
        own = run.engine.store.read(i)
        if "v" not in own:
            raise RunError(f"what client {name!r} owns stays at its site; this server has no model of its own for it")
        kind = split.kinds[int(split.kind_of(run.server.round, i))] if split.kind_of else Kind()
        x = held["x"] if kind.holds is None else kind.holds.fill(kind.holds.cut(held["x"]))
        return tensors(x, own["v"][0], own["b"][0])

    v = held["x"] if split.personal == split.layout else split.v0  # of twins, the server's is the one that is shared
    return Result(header, run.history, tensors(held["x"], v, split.b0), stopped, folder, run.task, client)
