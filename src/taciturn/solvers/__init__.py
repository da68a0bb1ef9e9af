"""LOCAL training. Every exported name is a part for `[method.solver]`; learning rates over rounds: schedules.py."""

from taciturn.solvers.optimizers import adamw, prox, sgd

__all__ = ["adamw", "prox", "sgd"]
