"""Devices and lines: what a round costs on them, and which client has which."""

from taciturn.core.price import Price
from taciturn.fleet.clock import Clock
from taciturn.fleet.counting import count
from taciturn.fleet.fleets import Fleet, named
from taciturn.fleet.machine import Measured, measure
from taciturn.fleet.profile import Operator, Profile

__all__ = ["Clock", "Fleet", "Measured", "Operator", "Price", "Profile", "count", "measure", "named"]
