"""Devices and lines: what a round costs on them."""

from taciturn.core.price import Price

__all__ = ["Price"]
