"""Many -> one. Every exported name is a part that can stand in `[method.aggregator]`."""

from taciturn.aggregation.mean import mean, weighted

__all__ = ["mean", "weighted"]
