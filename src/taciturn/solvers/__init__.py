"""LOCAL training. Every exported name is a part for `[method.solver]`; learning rates over rounds: schedules.py."""

from taciturn.solvers.admm import admm
from taciturn.solvers.blocks import alternating, joint
from taciturn.solvers.lbfgs import lbfgs
from taciturn.solvers.optimizers import adamw, prox, sgd
from taciturn.solvers.scaffold import scaffold
from taciturn.solvers.twins import ditto, pfedme

__all__ = ["adamw", "admm", "alternating", "ditto", "joint", "lbfgs", "pfedme", "prox", "scaffold", "sgd"]
