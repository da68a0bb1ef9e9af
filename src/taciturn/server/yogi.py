"""Yogi, the one optimizer of FedOpt that `torch.optim` lacks.

Symbols: x [d]; g gradient; m, s first and second moments; t steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Yogi(torch.optim.Optimizer):
    """m <- b1 m + (1 - b1) g;  s <- s - (1 - b2) sign(s - g^2) g^2;  x <- x - lr mhat / (sqrt(shat) + eps).

    mhat, shat: bias-corrected as in Adam; s starts at 0. State: step [], exp_avg, exp_avg_sq.
    Source: Zaheer et al. 2018, Algorithm 2. Departure: bias correction, so that `yogi` and `adam` start alike.
    """

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(x), torch.zeros_like(x)
                m, s, square = state["exp_avg"], state["exp_avg_sq"], x.grad.square()
                state["step"] += 1
                t = float(state["step"])
                m.lerp_(x.grad, 1 - b1)
                s.addcmul_(torch.sign(s - square), square, value=b2 - 1)
                root = (s / (1 - b2**t)).sqrt_().add_(group["eps"])
                x.addcdiv_(m, root, value=-group["lr"] / (1 - b1**t))
        return loss
