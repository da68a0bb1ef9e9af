"""FedOpt: a torch optimizer on the pseudo-gradient. Every exported name is a part for `[method.server]`."""

from taciturn.server.averaged import averaged, recent
from taciturn.server.fedopt import adagrad, adam, adamw, momentum, sgd, yogi

__all__ = ["adagrad", "adam", "adamw", "averaged", "momentum", "recent", "sgd", "yogi"]
