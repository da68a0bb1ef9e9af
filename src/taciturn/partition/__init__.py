"""WHAT is shared. Every exported name is a part that can stand in `[method.partition]`."""

from taciturn.partition.by_name import full, layers, local
from taciturn.partition.lora import lora
from taciturn.partition.twins import twins

__all__ = ["full", "layers", "local", "lora", "twins"]
