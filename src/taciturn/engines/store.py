"""What clients own between rounds, kept by the engine for those that took part.

Symbols: own: a client's record (client.py); m clients of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taciturn.core.state import State, row, stack


class ClientStore:
    """Rows of client state by id; a client that is not in it owns the newcomer's record."""

    def __init__(self, newcomer: State) -> None:
        self._newcomer = newcomer
        self._rows: dict[int, State] = {}

    def read(self, ids: Tensor) -> State:
        """Stacked records [m, ..] of these clients."""
        return stack([self._rows.get(i, self._newcomer) for i in ids.tolist()])

    def write(self, ids: Tensor, own: State) -> None:
        """Replace the records of these clients by the rows of a stacked record."""
        for place, client in enumerate(ids.tolist()):
            self._rows[client] = row(own, place)

    def export(self) -> State:
        """Everything as one record: {"ids": [n], "rows": stacked}; {} if no client has taken part."""
        if not self._rows:
            return {}
        ids = sorted(self._rows)
        return {"ids": torch.tensor(ids, dtype=torch.int64), "rows": stack([self._rows[i] for i in ids])}

    def restore(self, state: State) -> None:
        """The inverse of `export`. Tensors of no elements, which files drop, come back from the newcomer."""
        self._rows = {}
        for place, client in enumerate(state["ids"].tolist() if state else []):
            self._rows[client] = _like(self._newcomer, row(state.get("rows", {}), place))


def _like(pattern: State, found: State) -> State:
    """Empty sub-records have no tensor and so no trace in a file: put them back."""
    return {
        name: _like(value, found.get(name, {})) if isinstance(value, dict) else found[name]
        for name, value in pattern.items()
    }
