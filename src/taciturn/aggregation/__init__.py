"""Many -> one. Every exported name is a part that can stand in `[method.aggregator]`."""

from taciturn.aggregation.controlled import controlled
from taciturn.aggregation.low_rank import low_rank
from taciturn.aggregation.mean import mean, weighted
from taciturn.aggregation.nova import nova
from taciturn.aggregation.private import private
from taciturn.aggregation.running import running

__all__ = ["controlled", "low_rank", "mean", "nova", "private", "running", "weighted"]
