"""FedAPM: the clients' copies of the shared parameters are held together by duals, personal ones by a proximal term.

Symbols: x [d] the model received; y = u_i [d] the client's copy of it, v_i [p] its personal parameters, p_i [d] its dual,
rho and sigma penalties, all in units of the client's own loss f_i (in the paper's, where f_i is divided by the number m of
clients, p_i, rho, sigma and the learning rate's inverse are divided by m too); z_i = u_i + p_i / rho [d] its message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from taciturn.core.errors import require, unknown
from taciturn.core.extended import extended
from taciturn.core.state import State, where
from taciturn.core.types import Batch, Oracle, Record, Solver, Split
from taciturn.core.vector import Vector
from taciturn.solvers.blocks import alternating, check_blocks, one_schedule
from taciturn.solvers.optimizers import Schedule, sgd

Point = Literal["own", "server"]
RHO, BALANCE = 0.1, 0.05  # of rho = "auto": where it begins, and the ratio of the residuals that it wants
LOG_RHO = "admm.log_rho"


@dataclass(frozen=True, slots=True)
class admm:
    """A client's round of FedAPM, in the order v, u, p, z:

        v_i <- argmin f_i(v, u_i) + (sigma / 2) |v - v_i|^2             by v_steps local steps of the optimizer v
        u_i <- argmin f_i(v_i, u) + <p_i, u - x> + (rho / 2) |u - x|^2  by the round's further steps, of the optimizer u
        p_i <- p_i + rho (u_i - x),   z_i = u_i + p_i / rho             sent as the change of what the server knows of it

    and the server takes the mean of all clients' last z_i, those not in the cohort included: `aggregator = running(update
    = "point")` with `codec = difference(.., alpha = 1, memory = "mean")`, which is both halves of the memory of z_i. What
    arrives is binding for both sides: after a lossy message z' the client sets p_i = rho (z' - u_i), so that sum_i
    [p_i + rho (u_i - x)] = 0 after every aggregation, whatever was lost. Kept on the client: u_i, p_i, xi_i and v_i, of
    which nothing is sent. p_i = 0 and u_i = x0 at the start. With weights = "samples" on the server, the terms of client
    i count n_i / n in the whole Lagrangian. v_steps = 0 and partition full is FedADMM.
    How exactly: optimizers `lbfgs` on whole batches solve both; else fixed steps; xi > 0: the u-steps rest as soon as
    |g_y f_i + p_i + rho (u_i - x)|^2 <= xi_i on their batch, with xi_i <- max(xi_decay xi_i, xi_floor) in every round of
    the client, so that |g_y f_i(v_i, u_i) + p_i|^2 <= xi_i afterwards if batches are whole and steps suffice.
    rho "auto": residuals are balanced, rho |u_i - x| = BALANCE |g_y f_i + p_i|, the gradient at the first u-step; for
    SGD of rate lr that is about rho = BALANCE / (lr u_steps). log rho is one more shared number, received with x and sent
    with z_i: a client asks for what balances its own, at most a factor of 2 from the present; the mean of what all last
    asked for is next. It begins at RHO; p_i stays as it is when rho moves.
    v_at: u_i at which v is trained, the client's "own" (the paper) or the "server"'s x (the authors' code); u_start: where
    the u-steps begin, x (the authors' code) or the client's "own".
    Errors: `MethodError` for v_steps where nothing is personal. Departure: the paper's constants are those for a_i = 1 / m.
    Source: Zhu et al. 2025 (arXiv 2506.04672), algorithm 1; full model: Wang et al. 2022 (FedADMM).
    """

    point: ClassVar[bool] = True
    rho: float | Literal["auto"] = 0.2
    sigma: float = 0.2
    v_steps: int = 5
    v: Solver = sgd()
    u: Solver = sgd()
    v_at: Point = "own"
    u_start: Point = "server"
    xi: float = 0.0
    xi_decay: float = 0.9
    xi_floor: float = 1e-24

    def __post_init__(self) -> None:
        known = self.rho == "auto" or (isinstance(self.rho, (int, float)) and self.rho > 0)
        require(known, f'admm.rho: above 0 (without a penalty this is solver = alternating), or "auto"; got {self.rho!r}')
        require(self.sigma >= 0, f"admm.sigma: at least 0; got {self.sigma}")
        require(self.v_steps >= 0, f"admm.v_steps: at least 0; got {self.v_steps}")
        require(self.xi >= 0, f"admm.xi: at least 0 (0: steps decide); got {self.xi}")
        require(0 < self.xi_decay <= 1, f"admm.xi_decay: above 0 and at most 1; got {self.xi_decay}")
        require(self.xi_floor >= 0, f"admm.xi_floor: at least 0; got {self.xi_floor}")
        one_schedule("admm", self.u, self.v)
        for name in ("v_at", "u_start"):
            if getattr(self, name) not in (places := ("own", "server")):
                raise unknown("place", getattr(self, name), places, f"admm.{name}")

    @property
    def schedule(self) -> Schedule:
        """That of u and v."""
        return self.u.schedule

    @property
    def _inner(self) -> alternating:
        return alternating(self.v_steps, self.v, self.u)

    def extend(self, split: Split) -> Split:
        """[x] -> [x, log rho] where rho is found on the way."""
        return extended(split, {LOG_RHO: torch.tensor([math.log(RHO)])}) if self.rho == "auto" else split

    def init(self, split: Split) -> State:
        """u_i = x0, p_i = 0, xi_i; where rho is found, also the last one."""
        check_blocks(split, "admm", self.u, self.v, self.v_steps)
        xi = torch.tensor(self.xi, dtype=split.x0.dtype, device=split.x0.device)
        found = {"rho": torch.full_like(xi, RHO)} if self.rho == "auto" else {}
        return {"u": split.x0, "p": torch.zeros_like(split.x0), "xi": xi} | found

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y where the v-steps look from; where the u-steps start is kept until then."""
        places = {"own": state["u"], "server": x}
        xi = torch.clamp(state["xi"] * self.xi_decay, min=self.xi_floor) if self.xi else state["xi"]
        first = {"y": places[self.v_at if self.v_steps else self.u_start]}
        slope = {"slope": torch.zeros_like(xi)} if self.rho == "auto" else {}
        own = {"x": x, "p": state["p"], "v0": v, "xi": xi, "from": places[self.u_start]}
        return self._inner.begin(x, v, {}) | first | own | slope

    def _model(self, values: Vector) -> Vector:
        """The model's part of [d] values; that of rho is 0."""
        return values if self.rho != "auto" else torch.cat([values[:-1], torch.zeros_like(values[-1:])])

    def _rho(self, x: Vector) -> Any:
        """The penalty of a round."""
        return self.rho if self.rho != "auto" else torch.exp(x[-1])

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step on the augmented Lagrangian; the loss is f_i alone."""
        seen: list[tuple[Tensor, Tensor]] = []
        rho = self._rho(local["x"])

        def augmented(y: Vector, v: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
            loss, g_y, g_v = oracle(y, v, batch)
            gap, back = self._model(y - local["x"]), v - local["v0"]
            extra = (local["p"] * gap).sum() + rho / 2 * gap.square().sum() + self.sigma / 2 * back.square().sum()
            g_y = g_y + local["p"] + rho * gap
            seen.append((loss, g_y.square().sum()))
            return loss + extra, g_y, g_v + self.sigma * back

        moved, _ = self._inner.step(local, batch, augmented, lr_scale)
        loss, residual = seen[0]
        if self.rho == "auto":
            moved["slope"] = torch.where(local["t"] == self.v_steps, residual.sqrt(), local["slope"])
        if self.xi:
            rests = (local["t"] >= self.v_steps) & (residual <= local["xi"])
            moved = where(rests, local | {"t": moved["t"]}, moved)
        if self.v_steps and self.v_at != self.u_start:
            moved["y"] = torch.where(moved["t"] == self.v_steps, moved["from"], moved["y"])
        return moved, loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """z_i, and u_i, p_i, xi_i."""
        x, y, rho = local["x"], local["y"], self._rho(local["x"])
        gap = self._model(y - x)
        p = local["p"] + rho * gap
        z, kept = y + p / rho, {"u": y, "p": p, "xi": local["xi"]}
        if self.rho != "auto":
            return z, kept
        wanted = torch.log(BALANCE * local["slope"] / gap.norm()) - x[-1]
        asked = torch.where(torch.isfinite(wanted), wanted.clamp(-math.log(2), math.log(2)), 0.0)  # at rest: as it is
        return torch.cat([z[:-1], (x[-1] + asked).unsqueeze(0)]), kept | {"rho": rho}

    def settle(self, state: State, arrived: Vector) -> State:
        """The dual that belongs to what the server now knows as z_i [d]."""
        rho = state["rho"] if self.rho == "auto" else self.rho
        return state | {"p": self._model(rho * (arrived - state["u"])).to(state["p"].dtype)}

    def tell(self, local: State) -> Record:
        """gap = |u_i - x|^2; coupling = <p_i, u_i - x> + (rho / 2) |u_i - x|^2, what L_i has beside f_i; rho if found."""
        rho, gap = self._rho(local["x"]), self._model(local["y"] - local["x"])
        square = gap.square().sum()
        found = {"rho": rho} if self.rho == "auto" else {}
        return {"gap": square, "coupling": (local["p"] * gap).sum() + rho / 2 * square} | found

    def affine(self) -> None:
        """Not affine: the blocks take turns."""
        return
