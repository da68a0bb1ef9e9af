"""taciturn: train and fine-tune PyTorch models on data that stays with its owners, and say little on the wire.

>>> import taciturn
>>> result = taciturn.run(taciturn.recipe("quickstart").replace(rounds=1))
>>> result.bytes_up > 0
True
"""

from taciturn import aggregation, codecs, fleet, methods, participation, partition, precision, server, solvers, sync
from taciturn.advisor import advise
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import TaciturnError
from taciturn.experiment.config import read_fleet
from taciturn.experiment.experiment import Experiment, StopAt
from taciturn.experiment.recipes import recipe
from taciturn.experiment.result import Result, load
from taciturn.experiment.runner import run
from taciturn.method import Method
from taciturn.report import write_report
from taciturn.tasks import data, models
from taciturn.tasks.data.clients import Federation, LazyClients, TableClients
from taciturn.tasks.metrics import Metric
from taciturn.tasks.spec import TaskSpec
from taciturn.tasks.task import Task

__all__ = [
    "Broadcast",
    "Experiment",
    "Federation",
    "LazyClients",
    "Method",
    "Metric",
    "Result",
    "StopAt",
    "TableClients",
    "TaciturnError",
    "Task",
    "TaskSpec",
    "advise",
    "aggregation",
    "codecs",
    "data",
    "fleet",
    "load",
    "methods",
    "models",
    "participation",
    "partition",
    "precision",
    "read_fleet",
    "recipe",
    "run",
    "server",
    "solvers",
    "sync",
    "write_report",
]
