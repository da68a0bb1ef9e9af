"""What a codec costs in accuracy: closed forms, exact recursions and simulations of averaged compressed SGD."""

from taciturn.advisor.problems import LeastSquares

__all__ = ["LeastSquares"]
