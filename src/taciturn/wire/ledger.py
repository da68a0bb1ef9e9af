"""Who sent how many bytes, when, and what for.

A message has `payload` bytes (what the method's formulas count) and `frame` bytes (headers, checksums); what crosses
the line is their sum. Directions: "up" (client to server), "down". Kinds: "setup" (schemas and sizes, once), "model",
"update", "stats" (numbers that ride on an upload), "monitor" (mid-round checks), "plan" (a client's own numbers, such as
its bits), "evaluate". All counts are bytes. Local steps stand in the same book: with them it tells what each client did in
each exchange of the round, evaluation apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COLUMNS = ("down", "steps", "up")
_ONCE = {f"{way}/{kind}" for way in ("up", "down") for kind in ("setup", "evaluate")}


class Ledger:
    """Counts of the current round by client, and of the whole run by direction and kind."""

    def __init__(self) -> None:
        self.totals: dict[str, dict[str, int]] = {}
        self._round: dict[str, dict[str, int]] = {}
        self._spent: list[tuple[str, str, Tensor, Tensor]] = []  # direction, kind, ids [m], bytes of each [m]
        self._exchanges = 0
        self._work: list[dict[str, dict[int, int]]] = []  # of each exchange, by column and client

    def count(self, direction: str, kind: str, ids: Tensor, payload: Tensor | int, frame: int, messages: int = 1) -> None:
        """One message (or part of one, with messages = 0) of each client in `ids` [m]; `payload` [m], or one for all."""
        sizes = torch.as_tensor(payload, dtype=torch.int64).expand(len(ids))
        spent = int(sizes.sum())
        for table in (self._round, self.totals):
            entry = table.setdefault(f"{direction}/{kind}", {"payload": 0, "frame": 0, "messages": 0})
            entry["payload"] += spent
            entry["frame"] += frame * len(ids)
            entry["messages"] += messages * len(ids)
        self._spent.append((direction, kind, ids, sizes + frame))
        if kind != "evaluate":
            self._note(direction, ids, sizes + frame)

    def worked(self, ids: Tensor, steps: Tensor) -> None:
        """Local steps [m] of clients `ids` [m]."""
        self._note("steps", ids, steps)

    def _note(self, column: str, ids: Tensor, values: Tensor) -> None:
        now = max(0, self._exchanges - 1)  # the model and what follows it at once are one exchange
        while len(self._work) <= now:
            self._work.append({name: {} for name in _COLUMNS})
        noted = self._work[now][column]
        for i, value in zip(ids.tolist(), values.tolist(), strict=True):
            noted[i] = noted.get(i, 0) + value

    def work(self, ids: Tensor) -> Tensor:
        """Bytes down, local steps and bytes up of each client in each exchange of this round so far: [S, 3, m] int64."""
        rows = [[[noted[name].get(i, 0) for i in ids.tolist()] for name in _COLUMNS] for noted in self._work]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), len(_COLUMNS), len(ids))

    def exchange(self) -> None:
        """One more round trip between server and cohort."""
        self._exchanges += 1

    def spent(self, clients: int) -> tuple[float, float, int]:
        """Of this round so far: bytes up and down for each of `clients`, without what is sent once; round trips."""
        spent = [
            sum(e["payload"] + e["frame"] for name, e in self._round.items() if name.startswith(way) and name not in _ONCE)
            for way in ("up", "down")
        ]
        return spent[0] / clients, spent[1] / clients, self._exchanges

    def close_round(self) -> dict[str, Any]:
        """What the round cost, as plain numbers for the record; the next round starts at zero."""
        everyone = torch.cat([ids for _, _, ids, _ in self._spent] or [torch.zeros(0, dtype=torch.int64)])
        known, places = torch.unique(everyone, return_inverse=True)
        sums = {name: torch.zeros(len(known), dtype=torch.int64) for name in ("up", "down", "monitor")}
        cuts = torch.split(places, [len(ids) for _, _, ids, _ in self._spent])
        for (direction, kind, _, sizes), where in zip(self._spent, cuts, strict=True):
            sums[direction].index_add_(0, where, sizes)
            if kind == "monitor":
                sums["monitor"].index_add_(0, where, sizes)
        line = {name: int(values.sum()) for name, values in sums.items()} | {
            "exchanges": self._exchanges,
            "by_kind": self._round,
            "clients": {name: values.tolist() for name, values in sums.items()} | {"ids": known.tolist()},
        }
        self._round, self._spent, self._exchanges, self._work = {}, [], 0, []
        return line
