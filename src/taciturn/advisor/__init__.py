"""What a codec costs in accuracy: predicted for a task of yours from a pilot, and the theory that such predictions rest on.

Closed forms, exact recursions and simulations of averaged compressed SGD: problems, theory, study. Advice: advice.py.
"""

from taciturn.advisor.advice import Advice, advise, candidates, order, parse_bytes, tie
from taciturn.advisor.law import law_of
from taciturn.advisor.part import Part
from taciturn.advisor.pilot import Pilot, run_pilot
from taciturn.advisor.problems import LeastSquares
from taciturn.advisor.rank import Budget, Forecast, forecasts, weigh
from taciturn.advisor.study import least_squares
from taciturn.advisor.told import show
from taciturn.advisor.whole import Whole

STUDIES = {"least-squares": least_squares}  # what `taciturn run NAME` runs besides recipes

__all__ = [
    "Advice",
    "Budget",
    "Forecast",
    "LeastSquares",
    "Part",
    "Pilot",
    "STUDIES",
    "Whole",
    "advise",
    "candidates",
    "forecasts",
    "law_of",
    "order",
    "parse_bytes",
    "run_pilot",
    "show",
    "tie",
    "weigh",
]
