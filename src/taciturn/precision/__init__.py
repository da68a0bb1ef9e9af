"""WHICH precision: bits of training and upload by client. Every exported name is a part for `[method.precision]`."""

from taciturn.precision.policies import all, coarse, coarse_fine, fixed, random

__all__ = ["all", "coarse", "coarse_fine", "fixed", "random"]
