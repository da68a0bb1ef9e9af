"""Quadratics with a shared and a personal block, where everything about partial personalisation is known exactly.

Symbols: N clients; z = (u [d], v [p]), n = d + p; f_i(z) = z' H_i z / 2 - c_i' z, H_i positive definite; the problem is to
minimize the mean of f_i(u, v_i) over u and all v_i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from taciturn import Method, Task, partition
from taciturn.client import Work
from taciturn.core import random
from taciturn.engines import LocalEngine, build
from taciturn.round import ServerState, fed_round, start
from taciturn.tasks.built import BuiltTask
from taciturn.tasks.data.clients import Federation, TableClients


class Model(nn.Module):
    """u and v; the output is the value of the sample's quadratic."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(d))
        self.v = nn.Parameter(torch.zeros(p))

    def forward(self, sample: Tensor) -> Tensor:
        """[b, n n + n] -> [b, 1]."""
        z = torch.cat([self.u, self.v])
        n = len(z)
        h, c = sample[:, : n * n].unflatten(1, (n, n)), sample[:, n * n :]
        return (0.5 * torch.einsum("i,bij,j->b", z, h, z) - c @ z).unsqueeze(1)


@dataclass
class Quadratics:
    """N unlike quadratics; alike: 0 for unrelated ones, 1 for equal ones."""

    d: int = 3
    p: int = 2
    clients: int = 6
    alike: float = 0.3
    seed: int = 0
    h: Tensor = field(init=False)
    c: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, key = self.d + self.p, random.key(self.seed)
        roots = random.normal(random.fold(key, "h"), self.clients, n, n).double()
        roots = self.alike * roots[:1] + (1 - self.alike) * roots
        self.h = roots @ roots.mT / n + 0.3 * torch.eye(n, dtype=torch.float64)
        self.c = random.normal(random.fold(key, "c"), self.clients, n).double()

    def task(self) -> BuiltTask:
        """One sample a client, in float64."""
        samples = torch.cat([self.h.flatten(1), self.c], 1)
        fields = {"input": samples, "target": torch.zeros(self.clients, 1)}
        rows = TableClients.of(fields, {f"c{i}": [i] for i in range(self.clients)})
        federation = Federation(rows, "regression", 1)
        made = Task(lambda: Model(self.d, self.p), federation, loss=lambda out, target: out.squeeze(1), metrics=())
        return made.build(0, dtype=torch.float64)

    def value(self, u: Tensor, v: Tensor) -> Tensor:
        """f_i [N] at u [N, d] or [d] and v [N, p]."""
        z = torch.cat([u.expand(self.clients, -1), v], 1)
        return 0.5 * torch.einsum("ni,nij,nj->n", z, self.h, z) - (self.c * z).sum(1)

    def gradient(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """g_u [N, d] and g_v [N, p]."""
        z = torch.cat([u.expand(self.clients, -1), v], 1)
        g = torch.einsum("nij,nj->ni", self.h, z) - self.c
        return g[:, : self.d], g[:, self.d :]

    def optimum(self) -> tuple[Tensor, Tensor]:
        """u* [d] and v* [N, p]: v is eliminated, then one linear solve."""
        d = self.d
        uu, uv, vv = self.h[:, :d, :d], self.h[:, :d, d:], self.h[:, d:, d:]
        pull = torch.linalg.solve(vv, uv.mT)  # [N, p, d]
        schur = (uu - uv @ pull).mean(0)
        right = (self.c[:, :d] - torch.einsum("ndp,np->nd", uv, torch.linalg.solve(vv, self.c[:, d:]))).mean(0)
        u = torch.linalg.solve(schur, right)
        return u, torch.linalg.solve(vv, self.c[:, d:] - torch.einsum("npd,d->np", uv.mT, u))

    def lipschitz(self) -> dict[str, float]:
        """Largest constants over clients: of g_u in u and in v, of g_v in v."""
        d = self.d
        blocks = {"u": self.h[:, :d, :d], "uv": self.h[:, :d, d:], "v": self.h[:, d:, d:]}
        return {name: float(torch.linalg.matrix_norm(block, 2).max()) for name, block in blocks.items()}


@dataclass
class Federated:
    """A method on quadratics, round by round, with what clients keep in reach."""

    problem: Quadratics
    method: Method
    lose: Callable[[int, int], bool] | None = None
    name: str = "auto"

    def __post_init__(self) -> None:
        task = self.problem.task()
        self.method = self.method.replace(partition=partition.layers(shared=("u",)), batch_size=1)
        self.split = self.method.split(task.model, task.tracked)
        self.sizes, self.key = task.train.sizes, random.key(0)
        work = Work(task, self.split, self.method.solver, self.method.codec)
        self.engine: LocalEngine = build(self.name, work, self.method, self.key, lose=self.lose)[0]
        self.server: ServerState = start(self.split.x0, self.sizes, self.method)
        self.everyone = torch.arange(len(self.sizes))

    def round(self) -> Tensor:
        """One round -> who took part."""
        key = random.fold(self.key, "round", self.server.round)
        ids = self.method.participation.draw(self.server.round, key, torch.ones(len(self.sizes), dtype=torch.bool))
        self.server, stats = fed_round(self.server, ids, self.sizes[ids], self.method, self.engine, self.split, key)
        return ids[stats.status == 0]

    def own(self) -> dict[str, Tensor]:
        """What all clients keep [N, ..]: v, and of the solver u, p where it has them."""
        kept = self.engine.store.read(self.everyone)
        return {"v": kept["v"]} | kept["solver"]

    # ------------------------------------------------------------------------------------------- what theory speaks of

    def imbalance(self) -> float:
        """|sum_i [p_i + rho (u_i - x)]| over the sum of the terms' norms, of solver admm; 0 after every aggregation."""
        own = self.own()
        terms = own["p"] + self.method.solver.rho * (own["u"] - self.server.x)  # type: ignore[attr-defined]
        return float(terms.sum(0).norm() / terms.norm(dim=1).sum())

    def lagrangian(self) -> Tensor:
        """Sum over clients of f_i(u_i, v_i) + <p_i, u_i - x> + (rho / 2) |u_i - x|^2."""
        own, rho = self.own(), self.method.solver.rho  # type: ignore[attr-defined]
        gap = own["u"] - self.server.x
        value = self.problem.value(own["u"], own["v"])
        return (value + (own["p"] * gap).sum(1) + rho / 2 * gap.square().sum(1)).sum()

    def violations(self, rounds: int) -> int:
        """Rounds of the next ones in which the Lagrangian falls by less than a (|dv|^2 + |du|^2 + N |dx|^2), N clients.

        a = min(rho / 60, sigma / 2 - 4 rho / 15): lemma 1 of FedAPM (arXiv 2506.04672), which asks for exact steps.
        """
        rho, sigma = self.method.solver.rho, self.method.solver.sigma  # type: ignore[attr-defined]
        a, count = min(rho / 60, sigma / 2 - 4 * rho / 15), 0
        before, value = (self.own(), self.server.x), self.lagrangian()
        for _ in range(rounds):
            self.round()
            own, now = self.own(), self.lagrangian()
            moved = self.problem.clients * (self.server.x - before[1]).square().sum()
            moved += sum((own[name] - before[0][name]).square().sum() for name in ("u", "v"))
            count += int(value - now < a * moved - 1e-12)
            before, value = (own, self.server.x), now
        return count

    # -------------------------------------------------------------------------------- a round as an affine map of states

    def state(self) -> Tensor:
        """All that a round starts from, as one vector: v, and u, p of all clients, or x."""
        own = self.own()
        parts = [own["v"], own["u"], own["p"]] if "p" in own else [own["v"], self.server.x]
        return torch.cat([part.flatten() for part in parts])

    def put(self, state: Tensor) -> None:
        """Set what `state` gives; with duals, x is the mean of z_i, as after every aggregation."""
        n, d, p = self.problem.clients, self.problem.d, self.problem.p
        kept = self.engine.store.read(self.everyone)
        v = state[: n * p].view(n, p)
        if "p" in kept["solver"]:
            u, dual = state[n * p :].view(2, n, d)
            z = u + dual / self.method.solver.rho  # type: ignore[attr-defined]
            x, mean = z.mean(0), (z - self.split.x0).mean(0)
            kept |= {"solver": kept["solver"] | {"u": u, "p": dual}, "tx": kept["tx"] | {"h": z - self.split.x0}}
            self.server = _replaced(self.server, x, mean)
        else:
            self.server = _replaced(self.server, state[n * p :], None)
        self.engine.store.write(self.everyone, kept | {"v": v})

    def fixed_point(self) -> Tensor:
        """x [d] where a round with all clients changes nothing: the round is affine, one linear solve."""
        like = self.state()

        def after(state: Tensor) -> Tensor:
            self.put(state)
            self.round()
            return self.state()

        base = after(torch.zeros_like(like))
        columns = [after(unit) - base for unit in torch.eye(len(like), dtype=like.dtype)]
        found = torch.linalg.solve(torch.eye(len(like), dtype=like.dtype) - torch.stack(columns, 1), base)
        self.put(found)
        return self.server.x


def _replaced(server: ServerState, x: Tensor, mean: Tensor | None) -> ServerState:
    agg = server.agg if mean is None else server.agg | {"mean": mean}
    return ServerState(server.round, x, server.opt, agg, server.sync, None, server.merges)
