"""`coarse_fine` in a run: modes of a cohort, decided anew in each round by what the rounds before have taught.

    gap_k(m) ~ prior(m) + th_m'x,  T_k(m) ~ t_k(m) exp(th'_m x)                two regressions for each mode (learn.py)
    d_k(m) = a_k (1 + kappa h_k) (gap_k(m) - alpha width),  alpha = max(0.1, 0.9^(round + 1))

and the modes minimise J of allocate.py over the cohort, whose longest float round is T_ref and whose shares a_k sum to 1.
The first rounds play `coarse`. A client whose longest plausible round still fits is free to try another mode: at most 5 %
of the cohort's weight in the mean over rounds. Observed: gap_k, by the client; T_k, when its answer arrived. After FedHQ
(arXiv 2505.11982), its fine stage: the idea; the formulas are ours.

Symbols: N clients, M of a cohort, n_m modes, n features; t [N, n_m] seconds of the fleet's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import OK, Record
from taciturn.precision import learn
from taciturn.precision.allocate import Allocation, coarse
from taciturn.precision.cost import calibrated
from taciturn.precision.modes import Mode, mode
from taciturn.precision.penalty import penalties, prior
from taciturn.precision.policies import coarse_fine

SMOOTH = 0.3  # of what is smoothed over rounds, the share that is new
EXPLORE = 0.05  # of the weight of a cohort
DOUBT = 0.25  # of the prior of the worst mode: spread of gaps before any was seen


@dataclass(frozen=True, eq=False)
class adjusted:
    """times [N, n_m], reference [N] seconds of a round in each mode and in float; facts: "weight", "skew", "log_samples",
    "epochs" [N]; first [N]: the modes of `coarse`.
    """

    policy: coarse_fine
    times: Tensor
    reference: Tensor
    facts: Record
    first: Tensor

    learns: ClassVar[bool] = True

    @property
    def modes(self) -> tuple[str, ...]:
        """The policy's."""
        return self.policy.modes

    @property
    def inputs(self) -> int:
        """The policy's."""
        return self.policy.inputs

    @property
    def _modes(self) -> list[Mode]:
        return [mode(name) for name in self.modes]

    def init(self) -> State:
        """Nothing learned: {"mode" [N], "gap" and "time" by mode, "factor" [N, n_m], "smooth", "moved" [N], ..}."""
        n, zeros = len(self.first), torch.zeros(len(self.first), dtype=torch.float64)
        doubt = (DOUBT * max(prior(one) for one in self._modes)) ** 2
        return {
            "mode": self.first,
            "gap": {str(m): learn.fresh(variance=doubt) for m in range(len(self.modes))},
            "time": {str(m): learn.fresh(variance=0.01) for m in range(len(self.modes))},
            "factor": torch.ones(n, len(self.modes), dtype=torch.float64),
            "smooth": zeros,
            "moved": zeros,
            "guard": learn.watchful(self.policy.lam),
            "round": torch.tensor(0),
            "budget": torch.tensor(0.0, dtype=torch.float64),
            "makespan": torch.tensor(0.0, dtype=torch.float64),
        }

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """The best modes of the cohort [M], a few of them changed to learn from. key is not needed."""
        found, upper, widths = self._decide(ids, state)
        budget = float(state["budget"]) + EXPLORE
        return learn.explore(found.modes, upper, widths, self.facts["weight"][ids], found.makespan, budget)

    def update(self, state: State, ids: Tensor, drawn: Tensor, stats: Record) -> State:
        """What a round taught. stats [M]: "gap", "quantized" loss and "moved" of the clients, "seconds", "status"."""
        found, _, _ = self._decide(ids, state)
        x, share = self._features(ids, state), self._share(ids)
        good = (stats["status"] == OK) & torch.isfinite(stats["gap"]) & torch.isfinite(stats["quantized"])
        gaps, times = dict(state["gap"]), dict(state["time"])
        factor, smooth, moved = (state[name].clone() for name in ("factor", "smooth", "moved"))
        for place in good.nonzero().squeeze(1).tolist():
            i, m = int(ids[place]), int(drawn[place])
            gap, took = stats["gap"][place].double(), stats["seconds"][place].double() / self.times[i, m]
            gaps[str(m)] = learn.learn(gaps[str(m)], x[place, m], gap - prior(self._modes[m]))
            times[str(m)] = learn.learn(times[str(m)], x[place, m], took.log())
            factor[i, m] = calibrated(float(factor[i, m]), float(took), 1.0, SMOOTH)
            smooth[i] = (1 - SMOOTH) * smooth[i] + SMOOTH * gap
            moved[i] = stats["moved"][place]
        guard = state["guard"]
        if good.any():
            loss = (share * stats["quantized"].double())[good].sum() / share[good].sum()
            guard = learn.guarded(guard, float(torch.exp(-loss)), float(stats["seconds"][good].max()), found.makespan)
        tried = share[drawn != found.modes].sum()
        return state | {
            "mode": state["mode"].index_copy(0, ids, found.modes),
            "gap": gaps,
            "time": times,
            "factor": factor,
            "smooth": smooth,
            "moved": moved,
            "guard": guard,
            "round": state["round"] + 1,
            "budget": state["budget"] + EXPLORE - tried,
            "makespan": torch.tensor(found.makespan, dtype=torch.float64),
        }

    def tell(self, state: State) -> dict[str, Any]:
        """lam; the gap of the mean client in each mode, as it is known now; seconds that were predicted of the round."""
        x = self._features(torch.arange(len(self.first)), state).mean(0)
        gaps = [prior(one) + float(learn.predict(state["gap"][str(m)], x[m])[0]) for m, one in enumerate(self._modes)]
        told = {"lam": float(state["guard"]["lam"]), "predicted": float(state["makespan"])}
        return told | {"gap": dict(zip(self.modes, gaps, strict=True))}

    def _share(self, ids: Tensor) -> Tensor:
        weight = self.facts["weight"][ids].double()
        return weight / weight.sum()

    def _features(self, ids: Tensor, state: State) -> Tensor:
        """x [M, n_m, n]."""
        rounds, times = float(state["round"]), self.times[ids]
        column = {name: self.facts[name][ids].unsqueeze(1) for name in ("skew", "log_samples", "epochs")}
        column |= {"gap": state["smooth"][ids].unsqueeze(1), "moved": state["moved"][ids].unsqueeze(1)}
        return learn.features(
            weight=self._share(ids).unsqueeze(1) * len(ids),
            log_lr=0.0,
            progress=rounds / (rounds + 20),  # a run may be prolonged, so its planned rounds are not asked
            log_factor=state["factor"][ids].log(),
            slack=1 - times / times.max(),
            **column,
        )

    def _decide(self, ids: Tensor, state: State) -> tuple[Allocation, Tensor, Tensor]:
        """(modes of the cohort; times [M, n_m] s that will not be exceeded; widths [M, n_m] of the gaps)."""
        x, rounds, known = self._features(ids, state), int(state["round"]), range(len(self.modes))
        gap, width, slower, doubt = (
            torch.stack([learn.predict(state[what][str(m)], x[:, m])[part] for m in known], 1)
            for what in ("gap", "time")
            for part in (0, 1)
        )
        alpha = max(0.1, 0.9 ** (rounds + 1))
        expected = torch.tensor([prior(one) for one in self._modes], dtype=torch.float64)
        low = expected + gap - alpha * width
        times, lam = self.times[ids] * slower.exp(), float(state["guard"]["lam"])
        cost = penalties(self.facts["weight"][ids], self.facts["skew"][ids], self._modes, low, self.policy.kappa)
        best, before = coarse(times, cost, lam, float(self.reference[ids].max())), state["mode"][ids]
        never = float("inf") if rounds < self.policy.settle else 0.02
        found = learn.settled(before, best, times, cost, lam, float(self.reference[ids].max()), least=never)
        return found, times * doubt.exp(), width
