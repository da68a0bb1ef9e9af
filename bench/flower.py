"""A real federation over Flower against the loopback engine: the same TOML, the same bytes, the same model?

A SuperLink and two SuperNodes with TLS and node authentication, each a process of its own on this machine, run methods one
after the other; the loopback engine runs the same in this process. Compared are the final model, bit for bit, every byte of
every client by direction and kind (the record's lines), and the bytes of frames that the line carried. Measured are the
seconds of an exchange, and how many more seconds a round takes than with loopback. TLS is shown by a handshake that checks
the certificate, and by a plain-text connection that is refused; authentication by a node whose key was never registered.

Installs `taciturn[flower]` with the pinned versions if flwr is missing. Symbols: two clients, one at each node.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import arguments, finish
from taciturn import Experiment, Method, codecs, data, methods, participation, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import RunError
from taciturn.experiment import deployed, federation
from taciturn.sync import thresholds
from taciturn.tasks.models import mlp
from taciturn.tasks.spec import TaskSpec

ROOT = Path(__file__).parents[1]
NODES, ROUNDS = 2, 3
LIMIT = 900.0  # seconds that a run may take
SGD = solvers.sgd(lr=0.1)
ALL = {"participation": participation.all(), "batch_size": 16}
CHANGE = Broadcast(codecs.quantize8(), of="change")
METHODS = {
    "fedavg": Method(solver=SGD, **ALL),
    "fda": Method(solver=SGD, sync=sync.fda(theta=thresholds.fixed(0.3), max_blocks=3), broadcast=CHANGE, **ALL),
    "error_feedback": Method(solver=SGD, codec=codecs.error_feedback(codecs.top_k(share=0.05)), broadcast=CHANGE, **ALL),
    "fedapm": methods.fedapm(u=SGD, **ALL),
}
QUICK = ("fedavg", "fda")


def experiment(name: str) -> Experiment:
    """Digits at two sites with unlike labels."""
    task = TaskSpec(data.digits(clients=NODES, split=data.dirichlet(alpha=0.5)), mlp(hidden=(32,)))
    return Experiment(task, METHODS[name], rounds=ROUNDS, name=name, engine="loopback")


def install() -> None:
    """flwr with the pinned versions, into the environment that runs this."""
    if find_spec("flwr") is not None:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[flower]"], check=True, stdout=sys.stderr)
    invalidate_caches()


def secure(held: federation.Federation) -> dict[str, bool]:
    """Does the port speak TLS with our certificate, refuse plain text, and refuse a node whose key is not registered?"""
    context = ssl.create_default_context(cafile=str(held.keys / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", held.port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as line,
    ):
        tls = (line.version() or "").startswith("TLSv1.")
    answer = b""
    with socket.create_connection(("127.0.0.1", held.port), 5.0) as raw, suppress(OSError):
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = raw.recv(64)
    return {"tls": tls and not answer.startswith(b"HTTP/"), "authentication": _stranger_refused(held)}


def _stranger_refused(held: federation.Federation) -> bool:
    federation.make_keys(held.keys, NODES + 1)
    name = f"node-{NODES}"
    held.node(NODES)
    try:
        code = held.processes[name].wait(90.0)
    except subprocess.TimeoutExpired:
        return False
    finally:
        held.processes[name].kill()
        del held.processes[name]
    return code != 0


def compare(held: federation.Federation, name: str, place: Path) -> dict[str, Any]:
    """One method over Flower and over loopback."""
    mine, out = experiment(name), place / name / "run"
    began = time.perf_counter()
    wired = taciturn.run(mine)
    alone = time.perf_counter() - began
    app = deployed.bundle(mine, place / name / "app", **{"out": str(out), "min-available-nodes": NODES})
    held.run(app, out, lambda line: print(f"{name}: round {line['round']}", file=sys.stderr, flush=True), LIMIT)
    flown, carried = taciturn.load(out), json.loads((out / "carried.json").read_text())
    told = {"up": 0, "down": 0}
    for line in flown.history:
        for kind, entry in line["traffic"]["by_kind"].items():
            told[kind.split("/")[0]] += entry["payload"] + entry["frame"]
    rounds = [line["seconds"] for line in flown.history]
    exchanges = sum(line["traffic"]["exchanges"] for line in flown.history)
    return {
        "equal_model": all(torch.equal(flown.tensors[key], tensor) for key, tensor in wired.tensors.items()),
        "equal_bytes": told == carried["carried"]
        and [line["traffic"] for line in flown.history] == [line["traffic"] for line in wired.history],
        "bytes": told,
        "exchanges": exchanges,
        "exchange_seconds": median(carried["exchange_seconds"][1:]),
        "overhead_vs_loopback_seconds_per_round": (rounds[-1] - alone) / ROUNDS,
    }


def main() -> None:
    """The table and the JSON line."""
    quick = arguments(__doc__).quick
    install()
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="taciturn-flower-"))
    names = QUICK if quick else tuple(METHODS)
    try:
        with federation.Federation(place / "federation", NODES) as held:
            shown = secure(held)
            if not all(shown.values()):
                raise RunError(f"the federation is not secure: {shown}")
            processes = 1 + NODES
            rows = {name: compare(held, name, place) for name in names}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    table = Table("method", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(stderr=True).print(table)
    figures: dict[str, Any] = {name: all(row[name] for row in rows.values()) for name in ("equal_model", "equal_bytes")}
    for name in ("exchange_seconds", "overhead_vs_loopback_seconds_per_round"):
        figures[name] = median(row[name] for row in rows.values())
    figures |= shown | {"processes": processes, "rounds": ROUNDS, "methods": list(names), "each": rows}
    finish("flower", figures, quick)
    if not (figures["equal_model"] and figures["equal_bytes"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
