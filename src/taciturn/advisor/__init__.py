"""Which codec suits a task, predicted from a short pilot run."""

from taciturn.advisor.advice import Advice, advise, parse_bytes, show, split_list
from taciturn.advisor.pilot import Pilot, pilot
from taciturn.advisor.rank import Budget, Forecast, forecasts, law

__all__ = [
    "Advice",
    "Budget",
    "Forecast",
    "Pilot",
    "advise",
    "forecasts",
    "law",
    "parse_bytes",
    "pilot",
    "show",
    "split_list",
]
