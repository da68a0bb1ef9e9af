"""WHAT is shared. Every exported name is a part that can stand in `[method.partition]`."""

from taciturn.partition.by_name import full, layers

__all__ = ["full", "layers"]
