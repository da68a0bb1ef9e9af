"""Which codec suits a task, predicted from a short pilot run."""

from taciturn.advisor.advice import Advice, advise, candidates, order, parse_bytes, show, split_list, tie
from taciturn.advisor.law import law_of
from taciturn.advisor.pilot import Pilot, run_pilot
from taciturn.advisor.rank import Budget, Forecast, forecasts, weigh

__all__ = [
    "Advice",
    "Budget",
    "Forecast",
    "Pilot",
    "advise",
    "candidates",
    "forecasts",
    "law_of",
    "order",
    "parse_bytes",
    "run_pilot",
    "show",
    "split_list",
    "tie",
    "weigh",
]
