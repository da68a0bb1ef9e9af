"""Methods side by side on one's own task: a grid of experiments, run fairly, and what came out."""

from taciturn.compare.grid import Cell, Vary, grid, parse_vary
from taciturn.compare.lineup import LINEUP, chosen
from taciturn.compare.session import Outcome, compare

__all__ = ["LINEUP", "Cell", "Outcome", "Vary", "chosen", "compare", "grid", "parse_vary"]
