"""Federated dynamic averaging: synchronise when the models have drifted apart, not on a timetable.

Symbols: M clients of the cohort, weights [M]; u_i [d] drift of client i; a block is `block` local epochs; n blocks done;
H estimate of the models' variance (monitors.py); Theta the threshold (thresholds.py); rho what a round's messages cost,
in blocks of the slowest client.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from taciturn.core.errors import ConfigError, MethodError, require, unknown
from taciturn.core.price import Price
from taciturn.core.state import State
from taciturn.core.types import OK, Change, Observations, Payload, Plan, Record, Spent
from taciturn.core.vector import Vector
from taciturn.sync.monitors import MONITORS, Sizes, directions, drifts, estimate
from taciturn.sync.sketch import MOST
from taciturn.sync.thresholds import Look, Threshold, adaptive, plain

SHARE = 0.08  # of a round's time that looks may take with monitor_every = "auto"; clocks and cohorts differ by some more


@dataclass(frozen=True, slots=True)
class fda:
    """Blocks of local steps, a few bytes from each client after each; the round ends when H > Theta, or after max_blocks.

    Works with any solver, codec, partition and server optimizer; `fda()` needs no parameter.
    monitor: what clients tell, see monitors.py; "local": each halts by its own |u|^2 > Theta, and nothing is said before
    the upload. theta: how the threshold moves. price: what local work and messages cost; None: sending the model once, in
    float32, costs as much as `crossing` local epochs. max_blocks: None: the rule's. block: local epochs.
    pace "own": a block is passes over the client's own data; "longest": all do as many steps as the longest of the cohort.
    monitor_every "auto": where clients are elsewhere, looks are so far apart that they take SHARE of a round's time at
    most, by the seconds that looks and steps took in the last one, which are kept in the state; rounds may get longer than
    the threshold asks for, but for max_blocks. In a simulation looks take no time, and it changes nothing.
    rows, columns, seed: of the sketch. State, on the server: Theta and what the last round cost.
    Errors: `MethodError` for a cohort of one, whose variance is 0, where Theta is built from it.
    Source: FDA-Opt, arXiv 2505.04535 (`fda.published`); the adaptive threshold is ours.
    """

    monitor: Literal["naive", "linear", "sketch", "exact", "local"] = "naive"
    theta: Threshold = field(default_factory=adaptive)
    price: Price | None = None
    crossing: float = 5.0
    max_blocks: int | None = None
    block: float = 1.0
    pace: Literal["own", "longest"] = "own"
    monitor_every: Literal["auto"] | None = None
    rows: int = 3
    columns: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.monitor not in MONITORS:
            raise unknown("monitor", self.monitor, MONITORS, "sync.monitor")
        require(self.max_blocks is None or self.max_blocks >= 1, f"max_blocks: at least 1; got {self.max_blocks}")
        require(0 < self.crossing < math.inf, f"crossing: local epochs, above 0; got {self.crossing}")
        require(self.block > 0, f"block: local epochs, above 0; got {self.block}")
        if self.monitor_every not in (None, "auto"):
            raise ConfigError(f'sync.monitor_every: "auto", or nothing; got {self.monitor_every!r}')
        require(self.rows >= 1, f"rows: at least 1; got {self.rows}")
        require(1 <= self.columns <= MOST, f"columns: 1 to {MOST}; got {self.columns}")

    @classmethod
    def published(cls, max_blocks: int = 10) -> fda:
        """FDA-Opt as published: sketch of 3 x 500, Theta <- V (M/2) / n, blocks of an epoch of the longest client."""
        return cls(monitor="sketch", theta=plain(), max_blocks=max_blocks, pace="longest")

    @property
    def observer(self) -> Literal["client", "server"]:
        """The server, but for the local monitor."""
        return "client" if self.monitor == "local" else "server"

    @property
    def most(self) -> int:
        """M, most blocks of a round."""
        return self.theta.most if self.max_blocks is None else self.max_blocks

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.rows, self.columns, self.seed)

    def init(self, x: Vector) -> State:
        """Theta, and the cost of a round as long as none is known: the model up and down in float32, two round trips."""
        d = x.shape[-1]
        once = 4.0 * d
        state: State = {"rule": self.theta.init(), "d": torch.tensor(d), "round": torch.tensor(-1)}
        state["rho"] = torch.tensor(math.nan, dtype=torch.float64)
        state["cost"] = torch.tensor([once, once, 2.0, 0.0], dtype=torch.float64)
        state |= {"looks": torch.zeros(0, 3, dtype=torch.float64), "drift": torch.zeros(0, dtype=torch.float64)}
        state |= {"clocked": torch.zeros(2, dtype=torch.float64)} if self.monitor_every else {}
        return state | ({"xi": directions(self.seed, d)} if self.monitor == "linear" else {})

    # --------------------------------------------------------------------------------------------------- work and price

    def _steps(self, epoch_steps: Tensor, n: float) -> Tensor:
        """Local steps of each client after n blocks [M]."""
        base = epoch_steps.max().expand_as(epoch_steps) if self.pace == "longest" else epoch_steps
        return torch.ceil(base * (n * self.block) - 1e-9).to(torch.int64)

    def _rho(self, epoch_steps: Tensor, state: State) -> tuple[float, Price]:
        """What a round's messages cost, in blocks of the slowest client; and the price in use."""
        up, down, exchanges, measured = state["cost"].tolist()
        longest = float(epoch_steps.max())
        model_bytes = int(state["d"]) * 4
        price = self.price or Price.crossing(self.crossing, model_bytes=model_bytes, epoch_steps=longest)
        if price.step_seconds is None and measured > 0:
            price = replace(price, step_seconds=measured)
        block = (price.step_seconds or 0.0) * longest * self.block
        messages = price.seconds(steps=0, up=up, down=down, exchanges=exchanges)
        return (messages / block if block > 0 else math.nan), price

    def _measured(self, spent: Spent) -> float:
        """Seconds of a step by the clock, where the price asks for them; else 0, so that runs are alike."""
        return spent.step_seconds if self.price is not None and self.price.step_seconds is None else 0.0

    def _apart(self, epoch_steps: Tensor, state: State) -> float:
        """Blocks between looks, at least: (1 / SHARE - 1) seconds of steps for each second of a look; 0: any."""
        step, look = state["clocked"].tolist() if self.monitor_every else (0.0, 0.0)
        return (1 / SHARE - 1) * look / (step * float(epoch_steps.max()) * self.block) if step > 0 else 0.0

    def _limit(self, apart: float) -> float:
        """Most blocks: where none are given, enough for a look."""
        return float(self.most) if self.max_blocks is not None else max(float(self.most), apart)

    def schedule(self, epoch_steps: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """[M] steps per epoch -> ([M] limit after max_blocks, [M] steps before the first look)."""
        if len(epoch_steps) == 1 and not MONITORS[self.monitor].bound:
            raise MethodError(
                f'method.sync: a cohort of one client has no variance to watch with monitor = "{self.monitor}"; use '
                'monitor = "naive", or draw at least 2 clients'
            )
        rho, _ = self._rho(epoch_steps, state)
        known = not math.isnan(rho)
        if self.observer == "client":
            most = self.theta.alone(self.most, rho, state["rule"]) if known else 1.0
            return self._steps(epoch_steps, most), self._steps(epoch_steps, 1.0)
        apart = self._apart(epoch_steps, state)
        first = max(self.theta.first(rho, state["rule"]) if known else 1.0, apart)
        return self._steps(epoch_steps, self._limit(apart)), self._steps(epoch_steps, first)

    # -------------------------------------------------------------------------------------------------------- the round

    def signal(self, state: State) -> Payload:
        """For clients that stop themselves, Theta and rho, from which their limit follows; the linear monitor's xi."""
        if self.observer == "client":
            return {"theta": state["rule"]["theta"].float(), "rho": state["rho"].float()}
        return {"xi": state["xi"]} if self.monitor == "linear" else {}

    def observe(self, u: Vector, told: Record, signal: Payload) -> tuple[Payload, Tensor]:
        """The monitor's bytes; go on, but for the local monitor only while |u|^2 <= Theta."""
        payload = MONITORS[self.monitor].say(u, signal, self._sizes)
        go = (
            payload["norm"] <= signal["theta"].to(u.device) if self.monitor == "local" else torch.ones((), dtype=torch.bool)
        )
        return payload, go

    def watch(self, seen: Observations, plan: Plan, state: State) -> tuple[Tensor | None, State]:
        """H against Theta: the steps to the next look, or None."""
        if self.observer == "client":
            return None, state
        if plan.round == 0:
            state = state | {"cost": _with(state["cost"], self._measured(seen.spent))}
        payload = {name: tensor.cpu() for name, tensor in seen.payload.items()}
        found = estimate(MONITORS[self.monitor], payload, torch.where(seen.heard, plan.weights, 0.0), self._sizes)
        longest = plan.epoch_steps.max()
        n, h = float(seen.done.max() / (longest * self.block)), float(found)
        rho, _ = self._rho(plan.epoch_steps, state)
        most = self._limit(self._apart(plan.epoch_steps, state))  # as when the round began
        if self.monitor_every and plan.round == 0:
            state = state | {"clocked": _clocked(seen.spent)}
        begun, drift = int(state["round"]) == plan.round, drifts(payload)
        if begun:  # who has halted stands still
            drift = torch.where(seen.heard, drift, state["drift"])
        looks = state["looks"] if begun else state["looks"][:0]
        known = [*_looks(looks), (n, h)]
        theta = self.theta.at(known, rho, state["rule"])
        looks = torch.cat([looks, looks.new_tensor([[n, h, theta]])])
        state = state | {"round": torch.tensor(plan.round), "looks": looks, "drift": drift}
        if not h <= theta or n >= most:  # not finite: over, too
            return None, state
        apart = max(self._apart(plan.epoch_steps, state), 1 / (float(longest) * self.block))
        reach = max(self.theta.after(known, rho, state["rule"]), n + apart)
        return (self._steps(plan.epoch_steps, reach) - seen.done).clamp(min=0), state

    def update(self, state: State, plan: Plan, stats: Record, spent: Spent, change: Change) -> State:
        """Theta, from how the round ended, and what the round cost.

        V = S - |update|^2, S = mean |u|^2 as it was before encoding; where thresholds are built from S, V = S.
        """
        longest, monitor = float(plan.epoch_steps.max()), MONITORS[self.monitor]
        if self.observer == "client":
            state = state | {"drift": stats["norm"].double(), "looks": state["looks"][:0]}
        share = torch.where((stats["status"] == OK) & torch.isfinite(state["drift"]), plan.weights.double(), 0.0)
        share = share / share.sum()
        s = float(share @ torch.where(share > 0, state["drift"], 0.0))
        if self.observer == "client":
            base = plan.epoch_steps.double() if self.pace == "own" else longest
            n = float(share @ (stats["steps"].double() / base)) / self.block
        else:
            n = float(state["looks"][-1, 0])
        v = s if monitor.bound else max(0.0, s - float(change.update.double().square().sum()))
        measured = float(state["cost"][3]) if plan.round else self._measured(spent)  # in the first round, and never again
        cost = torch.tensor([spent.up, spent.down, float(spent.exchanges), measured], dtype=torch.float64)
        state = state | {"cost": cost, "variance": torch.tensor(v, dtype=torch.float64)}
        rho, _ = self._rho(plan.epoch_steps, state)
        known = _looks(state["looks"])
        state |= {"rule": self.theta.update(state["rule"], known, n, v, self.most, rho), "rho": cost.new_tensor(rho)}
        state |= {"clocked": _clocked(spent)} if self.monitor_every and spent.look_seconds > 0 else {}
        state |= {"blocks": cost.new_tensor(n), "longest": torch.tensor(longest, dtype=torch.float64)}
        return state | ({"xi": (change.update > 0).cpu()} if self.monitor == "linear" else {})

    def tell(self, state: State) -> dict[str, Any]:
        """Blocks of the round; blocks, H and Theta at each look; variance at the end; |u|^2 of each client; rho and price;
        what the rule carries over. None for what is not finite.
        """
        _, price = self._rho(state["longest"], state)
        told: dict[str, Any] = {name: _plain(state[name]) for name in ("blocks", "variance", "rho", "drift")}
        looks = [dict(zip(("blocks", "estimate", "threshold"), look, strict=True)) for look in _plain(state["looks"])]
        carried = {name: _plain(value) for name, value in state["rule"].items()}
        clocked = (
            dict(zip(("step_seconds", "look_seconds"), _plain(state["clocked"]), strict=True)) if self.monitor_every else {}
        )
        return told | {"price": asdict(price), "looks": looks, "next": carried} | ({"clocked": clocked} if clocked else {})


def _plain(tensor: Tensor) -> Any:
    """Numbers and lists of them; None for what is not finite."""
    if tensor.dim():
        return [_plain(one) for one in tensor]
    return float(tensor) if math.isfinite(float(tensor)) else None


def _clocked(spent: Spent) -> Tensor:
    """Seconds of a step and of a look elsewhere; zeros where clients are here."""
    seen = (spent.step_seconds, spent.look_seconds) if spent.look_seconds > 0 else (0.0, 0.0)
    return torch.tensor(seen, dtype=torch.float64)


def _with(cost: Tensor, step_seconds: float) -> Tensor:
    return torch.cat([cost[:3], cost.new_tensor([step_seconds])])


def _looks(table: Tensor) -> list[Look]:
    """[k, 3] -> (n, H) of each."""
    return [(n, h) for n, h, _ in table.tolist()]
