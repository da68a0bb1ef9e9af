"""The standing line-up: methods that a task is tried with, each made of the user's own by changing what the method is.

Every entry is a function Method -> Method: it keeps partition, participation, solver, batch size and aggregator of the
user, unless the method is a choice of just that, and starts from float32 both ways, a fixed interval and averaging at the
server (`plain`). Every method has one setting that is tuned, and three values of it, so all get the same number of trials:

    fedavg      local epochs a round: 1, 2, 5                                 its best interval
    fedadam     step of the server: 0.003, 0.01, 0.03
    all others  step of the clients: a third, one and three times the user's
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from taciturn import methods, precision, sync
from taciturn.codecs import error_feedback, identity, quantize, quantize4, quantize8
from taciturn.compare.grid import Vary
from taciturn.compare.session import Tuned
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import MethodError, TaciturnError, unknown
from taciturn.experiment import config
from taciturn.experiment.experiment import Experiment
from taciturn.method import Method
from taciturn.partition import lora as adapters
from taciturn.server import adam, sgd
from taciturn.tasks.spec import TaskSpec

Change = Callable[[Method], Method]


def plain(method: Method) -> Method:
    """The user's method without compression, at a fixed interval, averaged at the server."""
    rule = method.sync if isinstance(method.sync, sync.every) else sync.every()
    bare = method.encoded(identity()).replace(broadcast=Broadcast(identity()), precision=precision.all())
    return bare.replace(sync=rule, server=sgd(lr=1.0))


def fedavg(method: Method) -> Method:
    """FedAvg in float32, at the best of three intervals."""
    return plain(method).replace(sync=sync.every(epochs=1))


def fedadam(method: Method) -> Method:
    """Adam on the server (FedOpt), in float32."""
    return plain(method).replace(server=adam(lr=0.01))


def fda(method: Method) -> Method:
    """FedAvg that synchronises when the models have drifted apart (FDA), in float32."""
    return plain(method).replace(sync=sync.fda())


def four_bits(method: Method) -> Method:
    """FedAvg with 4 bits a value both ways, with error feedback."""
    down = Broadcast(quantize4("block"), of="change", start="known")
    return plain(method).replace(codec=error_feedback(quantize4("block")), broadcast=down)


def lora(method: Method) -> Method:
    """FedAvg of low-rank adapters (rank 4) in all linear layers but the head, which is shared beside them."""
    part = method.partition
    return plain(method).replace(partition=part if isinstance(part, adapters) else adapters(rank=4, alpha=8.0, also="head"))


def fedapm(method: Method) -> Method:
    """A head of its own for each client, held together by duals (FedAPM)."""
    return methods.fedapm(u=method.solver, participation=method.participation, batch_size=method.batch_size)


def hybrid(method: Method) -> Method:
    """3 bits a value up and 8 down; who has time trains quantization-aware (precision.coarse_fine)."""
    codec = error_feedback(quantize(bits=3, rounding="nearest", scale="channel"))
    found = plain(method).replace(codec=codec, broadcast=Broadcast(quantize8("block")))
    return found.replace(precision=precision.coarse_fine(modes=("ptq3", "qat3")))


def lean(method: Method) -> Method:
    """Says the least: thin factors in 3 bits both ways, with memory, by drift (Method.lean)."""
    return Method.lean(plain(method))


LINEUP: dict[str, Change] = {
    "fedavg": fedavg,
    "fedadam": fedadam,
    "fda": fda,
    "quantize4": four_bits,
    "lora": lora,
    "fedapm": fedapm,
    "hybrid": hybrid,
    "lean": lean,
}
EPOCHS = Vary("method.sync.epochs", ("1", "2", "5"), (1, 2, 5))
SERVER_LR = Vary("method.server.lr", ("0.003", "0.01", "0.03"), (0.003, 0.01, 0.03))
TUNED: dict[str, Tuned] = {"fedavg": EPOCHS, "fedadam": SERVER_LR}
STEP = {"fedapm": "method.solver.u.lr"}  # where the step of the clients stands, if not in method.solver.lr


def chosen(
    experiment: Experiment, names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Tuned | None], dict[str, str]]:
    """Names of the line-up, or "all" -> (tables [method], what is tuned of each, why the others of "all" do not fit).

    Errors: `UnknownName`; `MethodError` for a method that was named and does not fit the task.
    """
    wanted = list(LINEUP) if "all" in names else list(dict.fromkeys(names))
    tables: dict[str, dict[str, Any]] = {}
    unfit: dict[str, str] = {}
    for name in wanted:
        if name not in LINEUP:
            raise unknown("method", name, [*LINEUP, "all"], "--methods")
        try:
            found = fitted(experiment, LINEUP[name])
        except TaciturnError as error:
            if name in names:
                raise MethodError(f"--methods {name}: {error}") from error
            unfit[name] = str(error)
            continue
        tables[name] = config.to_table(found)["method"]
    return tables, {name: tuned(name, table) for name, table in tables.items()}, unfit


def fitted(experiment: Experiment, change: Change) -> Experiment:
    """The experiment with the method changed, its model cut as that asks. Errors: what says why it does not fit."""
    found = replace(experiment, method=change(experiment.method))
    if found.method.partition != experiment.method.partition and isinstance(found.task, TaskSpec):
        built = found.task.build(found.seed, prepare=found.method.partition.prepare)
        found.method.split(built.model, built.tracked)
    return found


def tuned(name: str, table: Mapping[str, Any]) -> Tuned | None:
    """What is tuned of a method with this table [method]; None where its solver has no step size (lbfgs)."""
    setting = TUNED.get(name) or STEP.get(name, "method.solver.lr")
    if isinstance(setting, str):
        try:
            config.set_path({"method": copy.deepcopy(dict(table))}, setting, 1.0)
        except TaciturnError:
            return None
    return setting
