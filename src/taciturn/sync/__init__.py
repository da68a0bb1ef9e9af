"""WHEN to synchronise. Every exported name is a part that can stand in `[method.sync]`."""

from taciturn.sync.every import every
from taciturn.sync.fda import fda

__all__ = ["every", "fda"]
