"""WHAT is shared. Every exported name is a part that can stand in `[method.partition]`."""

from taciturn.partition.by_name import full, layers
from taciturn.partition.lora import lora

__all__ = ["full", "layers", "lora"]
