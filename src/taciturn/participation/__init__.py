"""WHO takes part. Every exported name is a part that can stand in `[method.participation]`."""

from taciturn.participation.draws import all, available, cyclic, poisson, uniform

__all__ = ["all", "available", "cyclic", "poisson", "uniform"]
