"""kill -9 in a real federation: is an update lost, or counted twice, and does a killed server end in the same bits?

A SuperLink, two SuperNodes with TLS, node keys and resident processes, on this machine; FedAPM on digits: a personal head,
a dual and a memory at each client, their means at the server, so whatever is counted wrongly stays wrong. Processes of five
kinds are killed, one after the other, each at a seeded moment of a round once the last kill is got over. Checkpoints are
two rounds apart, so a server that is killed may go back over a round that its sites have done.

What the run did is then computed again by the text of the round in this process, over loopback, with the cohorts and the
losses of the record. A_i: rounds in which the record accepts client i; s: local steps of a round; c_i: the step counter in
the record of client i, of the generation that the server's last checkpoint accepts.

    lost_updates    sum_i max(0, |A_i| - c_i / s)      accepted by the server, and not in what the client keeps
    double_counted  sum_i max(0, c_i / s - |A_i|)      in what the client keeps, and not accepted, or more than once
    state_equal     model, server optimizer and means, and every client's dual, memory and head are those of the replay,
                    bit for bit, and so are the losses of every round
    resumed_equal   the same, of runs whose SuperLink or ServerApp was killed

The two counts say nothing of the server's model: where state_equal fails they are null. --seeds: runs, without --quick.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import finish, parser
from bench.flower import ALL, NODES, SGD, install
from taciturn import Experiment, codecs, data, methods
from taciturn.core import random as keys
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import RunError
from taciturn.core.state import State, equal, load_state, row
from taciturn.engines.site import fitted
from taciturn.engines.sites import Sites
from taciturn.experiment import deployed, federation
from taciturn.experiment.deployed import Nowhere
from taciturn.experiment.record import RunFolder, read_lines
from taciturn.experiment.runner import prepare, restore
from taciturn.round import ServerState, fed_round
from taciturn.tasks.models import mlp
from taciturn.tasks.spec import TaskSpec

SITES, SERVERS = ("supernode", "clientapp", "desk"), ("superlink", "serverapp")
KINDS = (*SITES, *SERVERS)
ROUNDS, OFTEN = {True: 8, False: 20}, {True: 1, False: 3}  # of a run; kills of each kind in it; by --quick
LIMIT, PATIENCE, LONGEST = 600.0, 180.0, 12.0  # seconds: without a result; for a victim to be there; from round to kill
METHOD = methods.fedapm(u=SGD, codec=codecs.top_k(share=0.3), broadcast=Broadcast(codecs.quantize8(), of="change"), **ALL)


def experiment(rounds: int, seed: int) -> Experiment:
    """Digits at two sites with unlike labels; measured at the end only, for an evaluation changes nothing that is kept."""
    task = TaskSpec(data.digits(clients=NODES, split=data.dirichlet(alpha=0.5)), mlp(hidden=(32,)))
    often = {"evaluate_every": rounds, "checkpoint_every": 2}
    return Experiment(task, METHOD, rounds=rounds, seed=seed, name="faults", engine="loopback", **often)


# ---------------------------------------------------------------------------------------------------------- the account


def replayed(mine: Experiment, history: Sequence[dict[str, Any]]) -> tuple[ServerState, list[State], list[float], Any]:
    """The rounds of a record, over loopback -> server, each client's own record, the losses of rounds, steps [N]."""
    state = prepare(mine.replace(engine="loopback"), lose=lambda r, i: i in _left_out(history[r], names))
    names, sizes, steps = list(state.task.train.names), state.task.train.sizes, torch.zeros(len(state.task.train.sizes))
    losses = []
    for r, line in enumerate(history):
        ids = torch.tensor(line["cohort"])
        key = keys.fold(state.key, "round", r)
        state.server, stats = fed_round(state.server, ids, sizes[ids], state.method, state.engine, state.work.split, key)
        good = stats.status == 0
        losses.append(sum(stats.loss[good].tolist()) / int(good.sum()))
        steps[ids[good]] += stats.steps[good]
    return state.server, [row(state.engine.store.read(torch.tensor([i])), 0) for i in range(len(sizes))], losses, steps


def _left_out(line: dict[str, Any], names: list[str]) -> set[int]:
    return {names.index(entry["client"]) for entry in line["left_out"]}


def kept(mine: Experiment, out: Path, homes: Sequence[Path]) -> tuple[ServerState, list[State]]:
    """What a deployed run has in the end: the server of its last checkpoint, and of each client the record that this
    checkpoint accepts, read at its site. homes: state-dirs; client i is at homes[i mod K].
    """
    run = prepare(mine.replace(engine="flower"), sites=lambda work, rule: Sites(Nowhere(), work, rule, "", ""))
    with RunFolder(out) as folder:
        restore(run, folder)
    own = []
    for i in range(len(run.task.train.sizes)):
        generation, fresh = int(run.engine.store.read(torch.tensor([i]))["generation"]), run.work.newcomer()
        if generation:
            (path,) = homes[i % len(homes)].glob(f"*/client-{i:06d}/generation-{generation:06d}.safetensors")
            fresh = fitted(fresh, load_state(path)[0]["own"], str(path))
        own.append(fresh)
    return run.server, own


def account(mine: Experiment, out: Path, homes: Sequence[Path]) -> dict[str, Any]:
    """The figures of a run that has ended; what they mean is said above."""
    history = read_lines(out)
    server, own = kept(mine, out, homes)
    again, theirs, losses, steps = replayed(mine, history)
    same = {name: equal(getattr(server, name), getattr(again, name)) for name in ("x", "opt", "agg", "sync")}
    same |= {f"client {i}": equal(one, other) for i, (one, other) in enumerate(zip(own, theirs, strict=True))}
    same["losses"] = [line["loss"] for line in history] == losses
    left_out = sum(len(line["left_out"]) for line in history)
    accepted = sum(len(line["cohort"]) for line in history) - left_out
    gaps = [(int(has) - int(one["steps"])) / (int(steps.sum()) / accepted) for has, one in zip(steps, own, strict=True)]
    return {
        "accepted": accepted,
        "left_out": left_out,
        "lost_updates": sum(math.ceil(max(0.0, gap)) for gap in gaps),
        "double_counted": sum(math.ceil(max(0.0, -gap)) for gap in gaps),
        "state_equal": all(same.values()),
        "differs": [name for name, is_equal in same.items() if not is_equal],
    }


# ------------------------------------------------------------------------------------------------------------ the kills


class Killer:
    """Kills processes of a federation while its run goes on: the next one after a round that followed the last kill.

    kills: kind, node, the round after which it came and how many seconds after, and seconds from it to the next round.
    """

    def __init__(self, held: federation.Federation, kinds: Sequence[str], seed: int) -> None:
        self.held, self.left, self.kills, self.repeated = held, list(kinds), list[dict[str, Any]](), 0
        self._draw, self._before, self._seen, self._long = random.Random(seed), time.monotonic(), 0, LONGEST
        self._thread: threading.Thread | None = None

    def say(self, line: dict[str, Any]) -> None:
        """A round is done: the last kill is got over, and the next one is due in it, or as long after as a round takes."""
        now, armed = time.monotonic(), self._thread is not None and self._thread.is_alive()
        self.repeated += line["round"] <= self._seen
        self._seen = max(self._seen, line["round"])
        print(f"round {line['round']} of {len(self.kills)} kills; {line['left_out'] or ''}", file=sys.stderr, flush=True)
        if not armed:
            if self.kills and "seconds" not in self.kills[-1]:
                self.kills[-1]["seconds"] = now - self.kills[-1].pop("at")
            else:
                self._long = min(self._long, now - self._before)  # of the shortest round that nobody disturbed
            if self.left:
                told = self.left.pop(0), self._draw.randrange(NODES), line["round"], self._draw.uniform(0.0, self._long)
                self._thread = threading.Thread(target=self._kill, args=told, daemon=True)
                self._thread.start()
        self._before = now

    def _kill(self, kind: str, node: int, after: int, delay: float) -> None:
        time.sleep(delay)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not (pids := self._victims(kind, node)):
            time.sleep(0.02)
        facts = {"node": node} if kind in SITES else {}
        self.kills.append({"kind": kind, "after": after, "delay": delay, "at": time.monotonic()} | facts)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        print(f"kill -9 {kind} {facts or ''}, {delay:.1f} s after round {after}", file=sys.stderr, flush=True)

    def _victims(self, kind: str, node: int) -> list[int]:
        if kind == "clientapp":
            return self.held.started(f"node-{node}", "flwr-clientapp")
        if kind == "serverapp":
            return self.held.started("superlink", "flwr-serverapp")
        name = {"supernode": f"node-{node}", "desk": f"desk-{node}", "superlink": "superlink"}[kind]
        process = self.held.processes[name]
        return [process.pid] if process.poll() is None else []


def disturbed(held: federation.Federation, mine: Experiment, place: Path, kinds: Sequence[str], seed: int) -> Killer:
    """A run to its end; whoever submits it does so again when its server was killed."""
    app = deployed.bundle(mine, place / "app", **{"out": str(place / "run"), "min-available-nodes": NODES})
    killer = Killer(held, kinds, seed)
    while True:
        before = len(killer.kills)
        try:
            held.run(app, place / "run", killer.say, LIMIT)
            return killer
        except RunError:
            if not any(kill["kind"] in SERVERS for kill in killer.kills[max(0, before - 1) :]):
                raise
        if held.processes["superlink"].poll() is not None:
            held.link()


def campaign(place: Path, seed: int, quick: bool) -> dict[str, Any]:
    """One federation, one run, kills of all kinds in a seeded order -> its account."""
    kinds = [*KINDS] * OFTEN[quick]
    random.Random(seed).shuffle(kinds)
    mine = experiment(ROUNDS[quick], seed)
    with federation.Federation(place / "federation", NODES) as held:
        killer = disturbed(held, mine, place, kinds, seed)
    result = taciturn.load(place / "run")
    done = len(result.history) == mine.rounds
    homes = [place / "federation" / f"node-{number}" for number in range(NODES)]
    figures = account(mine, place / "run", homes) | {"rounds": len(result.history), "repeated": killer.repeated}
    return {"seed": seed, "completed": done, "kills": killer.kills} | figures


# -------------------------------------------------------------------------------------------------------------- figures


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all runs. What was not measured is null, and `unmeasured` says why."""
    kills = [kill for run in runs for kill in run["kills"]]
    kinds = [kind for kind in KINDS if any(kill["kind"] == kind for kill in kills)]
    sure = all(run["completed"] and run["state_equal"] for run in runs)
    killed = [run["state_equal"] for run in runs if any(kill["kind"] in SERVERS for kill in run["kills"])]
    unmeasured = {} if sure else dict.fromkeys(("lost_updates", "double_counted"), "the state is not that of the replay")
    unmeasured |= {} if killed else {"resumed_equal": "no server was killed"}
    seconds = {k: [kill["seconds"] for kill in kills if kill["kind"] == k and "seconds" in kill] for k in kinds}
    return {
        "kinds": kinds,
        "kills": len(kills),
        "runs_completed": sum(run["completed"] for run in runs),
        "lost_updates": sum(run["lost_updates"] for run in runs) if sure else None,
        "double_counted": sum(run["double_counted"] for run in runs) if sure else None,
        "resumed_equal": all(killed) if killed else None,
        "n": {"runs": len(runs), "clients": NODES}
        | {name: sum(run[name] for run in runs) for name in ("rounds", "repeated", "accepted", "left_out")}
        | {"kills": {kind: sum(kill["kind"] == kind for kill in kills) for kind in kinds}},
        "seconds_from_kill_to_next_round": {kind: median(found) if found else None for kind, found in seconds.items()},
        "unmeasured": unmeasured,
        "each": runs,
    }


def main() -> None:
    """The table and the JSON line."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="runs, each of 20 rounds and 15 kills (not with --quick)")
    options = options.parse_args()
    install()
    torch.set_num_threads(1)
    place, began, runs = Path(tempfile.mkdtemp(prefix="taciturn-faults-")), time.monotonic(), []
    try:
        for seed in range(1 if options.quick else options.seeds):
            runs.append(campaign(place / str(seed), seed, options.quick))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    table = Table("seed", "killed", "node", "after round", "seconds after", "seconds to the next round")
    for run in runs:
        for kill in run["kills"]:
            whole = (f"{kill[name]:.1f}" if name in kill else "-" for name in ("delay", "seconds"))
            table.add_row(str(run["seed"]), kill["kind"], str(kill.get("node", "")), str(kill["after"]), *whole)
    Console(stderr=True).print(table)
    figures = summary(runs) | {"seconds": time.monotonic() - began}
    finish("faults", figures, options.quick)
    if figures["unmeasured"] or figures["lost_updates"] or figures["double_counted"] or not figures["resumed_equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
