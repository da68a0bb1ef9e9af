"""Who sent how many bytes, when, and what for.

A message has `payload` bytes (what the method's formulas count) and `frame` bytes (headers, checksums); what crosses
the line is their sum. Directions: "up" (client to server), "down". Kinds: "setup" (schemas and sizes, once), "model",
"update", "stats" (numbers that ride on an upload), "monitor" (mid-round checks), "evaluate". All counts are bytes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Ledger:
    """Counts of the current round by client, and of the whole run by direction and kind."""

    def __init__(self) -> None:
        self.totals: dict[str, dict[str, int]] = {}
        self._round: dict[str, dict[str, int]] = {}
        self._clients: dict[int, dict[str, int]] = defaultdict(lambda: {"up": 0, "down": 0, "monitor": 0})
        self._exchanges = 0

    def count(self, direction: str, kind: str, ids: Tensor, payload: Tensor | int, frame: int, messages: int = 1) -> None:
        """One message (or part of one, with messages = 0) of each client in `ids` [m]; `payload` [m], or one for all."""
        sizes = torch.as_tensor(payload).expand(len(ids)).tolist()
        for table in (self._round, self.totals):
            entry = table.setdefault(f"{direction}/{kind}", {"payload": 0, "frame": 0, "messages": 0})
            entry["payload"] += sum(sizes)
            entry["frame"] += frame * len(ids)
            entry["messages"] += messages * len(ids)
        for client, size in zip(ids.tolist(), sizes, strict=True):
            self._clients[client][direction] += size + frame
            if kind == "monitor":
                self._clients[client]["monitor"] += size + frame

    def exchange(self) -> None:
        """One more round trip between server and cohort."""
        self._exchanges += 1

    def close_round(self) -> dict[str, Any]:
        """What the round cost, as plain numbers for the record; the next round starts at zero."""
        ids = sorted(self._clients)
        line = {
            "up": sum(self._clients[i]["up"] for i in ids),
            "down": sum(self._clients[i]["down"] for i in ids),
            "monitor": sum(self._clients[i]["monitor"] for i in ids),
            "exchanges": self._exchanges,
            "by_kind": self._round,
            "clients": {name: [self._clients[i][name] for i in ids] for name in ("up", "down", "monitor")} | {"ids": ids},
        }
        self._round, self._exchanges = {}, 0
        self._clients.clear()
        return line
