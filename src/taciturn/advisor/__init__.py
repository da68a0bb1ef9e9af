"""What a codec costs in accuracy: closed forms, exact recursions and simulations of averaged compressed SGD."""

from taciturn.advisor.problems import LeastSquares
from taciturn.advisor.study import least_squares

STUDIES = {"least-squares": least_squares}  # what `taciturn run NAME` runs besides recipes

__all__ = ["LeastSquares", "STUDIES"]
