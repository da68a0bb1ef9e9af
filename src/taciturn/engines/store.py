"""What is kept of every client between rounds, and the one commit that it shares with the checkpoint.

In a run folder the rows are files, and a checkpoint holds none of them:

    clients.json               what the rows look like
    clients.NAME               a sparse file of rows for each table (rows.py)
    clients.journal.000012     what rows held at the checkpoint after round 12 that were changed since (journal.py)

A round changes rows where they lie, but first writes what they held to the journal. The commit is the rename of the
checkpoint file: rows are seen to the disk, the checkpoint is renamed, and the next change begins its journal. Whoever
resumes from the checkpoint after round r puts back the journals from the newest to r, newest first, and then deletes
them in that order; so it may be killed at any point and start again. A checkpoint that is kept keeps its journal.

Symbols: N clients in all; ids [m] clients of a cohort or block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from taciturn.core.errors import RunError
from taciturn.core.state import State, sync_folder, write_atomic
from taciturn.engines import journal
from taciturn.engines.rows import Ids, Rows

FORMAT = 1


class ClientStore:
    """Tables of rows by client, in memory until `create` or `recover` gives them a folder."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._tables: list[Rows] = []
        self._saved: dict[str, NDArray[np.int32]] = {}  # by table [N]: the commit since which a row is in the journal
        self._folder: Path | None = None
        self._round, self._commits = 0, 1
        self.oldest = 0  # the first round whose checkpoint is kept, since this process began

    def table(self, name: str, newcomer: State) -> Rows:
        """A table whose rows begin as the newcomer's record."""
        rows = Rows(name, newcomer, self._clients, lambda table, ids: self._remember([(table, ids)]))
        self._tables.append(rows)
        self._saved[name] = np.zeros(self._clients, dtype=np.int32)
        return rows

    def touch(self, ids: Tensor) -> None:
        """The rows of these clients are about to change, in all tables: one append for the cohort."""
        places = ids.cpu().numpy()
        self._remember([(table, places) for table in self._tables])

    def _remember(self, changes: list[tuple[Rows, Ids]]) -> None:
        """Write what these rows hold to the journal, unless it is there already."""
        if self._folder is None:
            return
        parts, fresh = [], []
        for table, ids in changes:
            new = np.unique(ids[self._saved[table.name][ids] != self._commits])
            if table.width and len(new):
                parts.append((self._tables.index(table), new, table.raw(new)))
                fresh.append((table.name, new))
        if parts:
            journal.append(_journal(self._folder, self._round), parts)
        for name, new in fresh:
            self._saved[name][new] = self._commits

    # -------------------------------------------------------------------------------------------------------- a folder

    def create(self, folder: Path) -> None:
        """Keep the rows in a folder that has no checkpoint: every client is a newcomer."""
        for old in folder.glob("clients.*"):
            old.unlink()
        for table in self._tables:
            table.open(folder / f"clients.{table.name}", create=True)
        write_atomic(folder / "clients.json", [json.dumps(self._description(), indent=1).encode()])
        self._folder, self._round = folder, 0

    def recover(self, folder: Path, round: int) -> None:
        """Take up the rows of a folder as they were at its checkpoint after `round`.

        Errors: `RunError` if there are none, if they are of another shape, or if a journal is damaged.
        """
        self._check(folder / "clients.json")
        for table in self._tables:
            table.open(folder / f"clients.{table.name}", create=False)
        later = [number for number in _journals(folder) if number >= round]
        if later and later[0] != round:
            raise RunError(f"{folder}: the journal {_journal(folder, round).name} is missing; rows cannot be put back")
        widths = [table.width for table in self._tables]
        for number in reversed(later):
            for batch in journal.read(_journal(folder, number), widths, newest=number == later[-1]):
                for which, ids, rows in batch:
                    self._tables[which].put(ids, rows)
        self.flush()
        for number in reversed(later):
            _journal(folder, number).unlink()
            sync_folder(folder)
        self._folder, self._round = folder, round

    def renew(self, ids: Tensor) -> None:
        """Make these clients newcomers, in all tables, at the checkpoint that was recovered."""
        for table in self._tables:
            table.renew(ids.cpu().numpy())
        self.flush()

    def flush(self) -> None:
        """See all rows to the disk: before the checkpoint is written."""
        for table in self._tables:
            table.flush()

    def commit(self, round: int, oldest: int) -> None:
        """The checkpoint after `round` is on the disk; `oldest` is the first round whose checkpoint is kept."""
        self._round, self.oldest = round, oldest
        self._commits += 1
        if self._folder is not None:
            for number in _journals(self._folder):
                if number < oldest:
                    _journal(self._folder, number).unlink()

    @property
    def kept(self) -> bool:
        """True if rows are in a folder, so that a server may go back to a checkpoint."""
        return self._folder is not None

    def moved_on(self) -> bool:
        """True if another run went on in the folder since this store's last commit, so that rows are not its own."""
        return self._folder is not None and any(number >= self._round for number in _journals(self._folder))

    def describe(self) -> dict[str, Any]:
        """What the rows of each table look like, as plain JSON."""
        return {table.name: table.describe() for table in self._tables}

    def _description(self) -> dict[str, Any]:
        return {"format": FORMAT, "clients": self._clients, "tables": self.describe()}

    def _check(self, path: Path) -> None:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path}, which says what the clients' rows look like: {error}") from error
        if found != (mine := self._description()):
            said = {name: value for name, value in found.items() if mine.get(name) != value}
            raise RunError(
                f"{path.parent} keeps rows of other clients or another shape: {json.dumps(said)}; this run has "
                f"{json.dumps({name: mine.get(name) for name in said})}; resume it with the task and method it began with"
            )


def _journal(folder: Path, round: int) -> Path:
    return folder / f"clients.journal.{round:06d}"


def _journals(folder: Path) -> list[int]:
    """The rounds that have a journal, ascending."""
    return sorted(int(path.suffix[1:]) for path in folder.glob("clients.journal.*"))
