"""LOCAL training. Every exported name is a part that can stand in `[method.solver]`; schedules.py has the learning rates over rounds."""

from taciturn.solvers.optimizers import adamw, prox, sgd

__all__ = ["adamw", "prox", "sgd"]
