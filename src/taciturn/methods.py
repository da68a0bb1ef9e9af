"""Published methods for clients that are unlike, each a choice of parts; every part can be changed by name.

Symbols: x shared, v_i personal parameters; u, v their optimizers (v as u unless given); steps: local steps a round. `parts`
are fields of `Method` and replace what is chosen here: participation, batch_size, sync, codec ...

    method    what is shared      what is sent up         what holds the clients together
    fedavg    all                 change of the model     the mean
    fedprox   all                 change of the model     the mean, and (mu / 2) |y - x|^2
    fedsim    all but v           change of x             the mean; v and x move at once (FedPer)
    fedalt    all but v           change of x             the mean; first v, then x (FedRep)
    fedapm    all but v           change of u + p / rho   duals, and the mean over ALL clients
    fedadmm   all                 change of u + p / rho   the same, nothing personal
    scaffold  all, and controls   changes of both         the mean, and gradients without the clients' bias
    ditto     all                 change of the model     the mean; a personal model is held near x
    pfedme    all                 change of w             the mean; a personal model is held near w
    local     nothing             nothing                 nothing

>>> fedapm(rho=0.5).sync.steps
10
"""

from __future__ import annotations

from typing import Any, Literal

from taciturn import solvers
from taciturn.aggregation import controlled, mean, running
from taciturn.codecs import difference, identity
from taciturn.core.types import Codec, Partition, Solver
from taciturn.method import Method
from taciturn.partition import full, layers, twins
from taciturn.partition import local as alone
from taciturn.sync import every

HEAD, SGD = layers(personal="head"), solvers.sgd(lr=0.1)


def _method(steps: int, parts: dict[str, Any], **chosen: Any) -> Method:
    """The chosen parts, with a fixed number of local steps and every client counting the same, unless others are given."""
    fields: dict[str, Any] = {"sync": every(steps=steps), "aggregator": mean(), **chosen, **parts}
    return Method(**fields)


def fedavg(u: Solver = SGD, *, steps: int = 10, **parts: Any) -> Method:
    """FedAvg: all is shared, and averaged after `steps` (McMahan et al. 2017, algorithm 1)."""
    return _method(steps, parts, solver=u)


def fedprox(u: Solver = SGD, *, mu: float = 0.01, steps: int = 10, **parts: Any) -> Method:
    """FedProx: FedAvg whose clients are pulled towards x by (mu / 2) |y - x|^2 (Li et al. 2020, algorithm 2)."""
    return _method(steps, parts, solver=solvers.prox(mu=mu, solver=u))


def fedsim(
    partition: Partition = HEAD, *, u: Solver = SGD, v: Solver | None = None, steps: int = 10, **parts: Any
) -> Method:
    """FedSim: shared and personal parameters move at once (Pillutla et al. 2022); with a personal head, FedPer."""
    return _method(steps, parts, partition=partition, solver=solvers.joint(v=v or u, u=u))


def fedalt(
    partition: Partition = HEAD,
    *,
    u: Solver = SGD,
    v: Solver | None = None,
    v_steps: int = 5,
    u_steps: int = 5,
    **parts: Any,
) -> Method:
    """FedAlt: v_steps on the personal parameters, then u_steps on the shared ones (Pillutla et al. 2022); FedRep."""
    return _method(
        v_steps + u_steps, parts, partition=partition, solver=solvers.alternating(v_steps=v_steps, v=v or u, u=u)
    )


def fedapm(
    partition: Partition = HEAD,
    *,
    rho: float | Literal["auto"] = "auto",
    sigma: float = 0.2,
    u: Solver = SGD,
    v: Solver | None = None,
    v_steps: int = 5,
    u_steps: int = 5,
    codec: Codec = identity(),
    **parts: Any,
) -> Method:
    """FedAPM: FedAlt's steps on an augmented Lagrangian, one dual a client (Zhu et al. 2025). codec: of what is new."""
    solver = solvers.admm(rho=rho, sigma=sigma, v_steps=v_steps, v=v or u, u=u)
    memory = {"codec": difference(codec, alpha=1.0, memory="mean"), "aggregator": running(update="point")}
    return _method(v_steps + u_steps, parts, partition=partition, solver=solver, **memory)


def fedadmm(
    u: Solver = SGD, *, rho: float | Literal["auto"] = "auto", steps: int = 10, codec: Codec = identity(), **parts: Any
) -> Method:
    """FedADMM: the same for a model that is shared as a whole (Wang et al. 2022)."""
    return fedapm(full(), rho=rho, sigma=0.0, u=u, v_steps=0, u_steps=steps, codec=codec, **parts)


def scaffold(lr: float = 0.1, *, rate: float = 1.0, steps: int = 10, **parts: Any) -> Method:
    """SCAFFOLD: SGD whose clients correct their drift; twice the values each way (Karimireddy et al. 2020)."""
    return _method(steps, parts, solver=solvers.scaffold(lr=lr), aggregator=controlled(lr=rate))


def ditto(u: Solver = SGD, *, lam: float = 0.1, v: Solver | None = None, steps: int = 10, **parts: Any) -> Method:
    """Ditto: FedAvg, and beside it a personal model with (lam / 2) |v - x|^2 (Li et al. 2021, algorithm 1)."""
    return _method(steps, parts, partition=twins(), solver=solvers.ditto(lam=lam, u=u, v=v or u))


def pfedme(lr: float = 0.005, *, lam: float = 15.0, local_lr: float = 0.01, steps: int = 10, **parts: Any) -> Method:
    """pFedMe: w follows a personal model that minimizes f + (lam / 2) |v - w|^2 (Dinh et al. 2020, algorithm 1)."""
    return _method(steps, parts, partition=twins(), solver=solvers.pfedme(lam=lam, lr=lr, local_lr=local_lr))


def local(u: Solver = SGD, *, steps: int = 10, **parts: Any) -> Method:
    """Each client alone, in the rounds it takes part in: no value of the model on the line."""
    return _method(steps, parts, partition=alone(), solver=u)
