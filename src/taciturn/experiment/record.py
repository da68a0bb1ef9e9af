"""The run folder: what was run, one line a round, checkpoints; and who may write to it.

run.json                    experiment, versions, sizes, the engine's path and every other choice that was measured
config.toml                 the experiment, to run again
record.jsonl                one line a round
checkpoint-000012.safetensors   server, optimizer and counters after round 12: one file, one rename, which also commits ..
clients.*                   .. the rows of the clients and their undo journals (engines/store.py)
model.safetensors           the named parameters after the last round
result.json                 the summary of a finished run
lock                        held (flock) while a process writes
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from taciturn.core.errors import RunError, RunLocked
from taciturn.core.state import State, load_state, save_state, sync_folder, write_atomic
from taciturn.engines.store import ClientStore

FORMAT = 1  # of run.json and record.jsonl
CHECKPOINT = 2  # 1: held the rows of the clients
KEPT = 2  # checkpoints
MAY_DIFFER = (  # of an experiment that is resumed
    *("rounds", "workers", "stop_at", "checkpoint_every", "target", "name"),
    *("evaluate_every", "evaluate_clients_every"),
)


def same_experiment(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Errors: `RunError` where a run folder holds a run of another configuration; `MAY_DIFFER` aside."""
    changed = [k for k in {*before, *now} if k not in MAY_DIFFER and before.get(k) != now.get(k)]
    if changed:
        raise RunError(
            f"{folder} was run with another {', '.join(sorted(changed))}; a resumed run keeps them (only "
            f"{', '.join(MAY_DIFFER)} may change)"
        )


class RunFolder:
    """A run folder that this process writes to; a context manager that holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._record: IO[bytes] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+")
        except OSError as error:
            raise RunError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunLocked(
                f"another process writes to the run folder {self.path}; wait for it or choose another"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self._record is not None:
            self._record.close()
        if self._lock is not None:
            self._lock.close()

    # -------------------------------------------------------------------------------------------------- begin, resume

    def holds_run(self) -> bool:
        """True if a run was started here."""
        return (self.path / "run.json").exists()

    def create(self, header: dict[str, Any], toml: str) -> None:
        """Write run.json and config.toml of a new run."""
        if self.holds_run():
            raise RunError(f"{self.path} holds a run already; resume it (--resume {self.path}) or choose another folder")
        write_atomic(self.path / "config.toml", [toml.encode()])
        write_atomic(self.path / "run.json", [json.dumps({"format": FORMAT, **header}, indent=1).encode()])

    def header(self) -> dict[str, Any]:
        """run.json. Errors: `RunError` if it is missing, broken or of another version."""
        return read_header(self.path)

    # ---------------------------------------------------------------------------------------------------------- rounds

    def append(self, line: dict[str, Any]) -> None:
        """Add a round to the record, and see it to the disk before the checkpoint that counts it."""
        path = self.path / "record.jsonl"
        try:
            if self._record is None:
                self._record = open(path, "ab")  # noqa: SIM115
            self._record.write(json.dumps(line).encode() + b"\n")
            self._record.flush()
            os.fsync(self._record.fileno())
        except OSError as error:
            self._record = None
            raise RunError(
                f"cannot write {path}: {error.strerror}; the last good checkpoint is kept: resume from {self.path}"
            ) from error

    def lines(self, rounds: int) -> list[dict[str, Any]]:
        """The first `rounds` lines; what a crash left beyond the checkpoint is cut off and run again."""
        path = self.path / "record.jsonl"
        lines = read_lines(self.path)[:rounds]
        if len(lines) < rounds:
            raise RunError(f"{path} has {len(lines)} rounds, the checkpoint {rounds}; the record was cut by hand")
        write_atomic(path, [json.dumps(line).encode() + b"\n" for line in lines])
        return lines

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save(self, round: int, state: State, meta: dict[str, Any], clients: ClientStore) -> None:
        """Write the checkpoint after a round and, with it, what was done to the clients' rows; keep the newest two."""
        clients.flush()
        save_state(self._checkpoint(round), state, {"format": CHECKPOINT, "round": round, **meta})
        found = self._checkpoints()
        for path in found[:-KEPT]:
            path.unlink(missing_ok=True)
        clients.commit(round, oldest=int(found[-KEPT:][0].stem.removeprefix("checkpoint-")))

    def load(self) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that can be read; None if there is none. Newer ones that cannot are set aside.

        Errors: `RunError` if none can be read, or if another version wrote it.
        """
        found = self._checkpoints()
        for path in reversed(found):
            try:
                state, meta = load_state(path)
            except RunError:
                if path == found[0]:
                    raise
                continue
            if meta.get("format") != CHECKPOINT:
                raise RunError(
                    f"{path} is a checkpoint of format {meta.get('format')}; this version resumes format {CHECKPOINT}: end "
                    "the run with the version that began it (run.json says which), or start anew"
                )
            for newer in found[
                found.index(path) + 1 :
            ]:  # the clients' rows go back to this one: they must not be read again
                newer.rename(newer.with_name(newer.name + ".unreadable"))
                sync_folder(self.path)
            return state, meta
        return None

    def _checkpoint(self, round: int) -> Path:
        return self.path / f"checkpoint-{round:06d}.safetensors"

    def _checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("checkpoint-*.safetensors"))


def read_header(folder: Path) -> dict[str, Any]:
    """run.json of a folder. Errors: `RunError` if it is missing, broken or of another version."""
    path = folder / "run.json"
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError(f"{folder} is not a run folder: it has no run.json") from error
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise RunError(f"{folder} was written in format {found}; this version reads format {FORMAT}")
    return header


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The rounds of the record; none if it is missing. A torn last line (a crash while writing) is left out, and where a
    resumed run repeats rounds, the later lines count. Errors: `RunError` for a broken line before the last.
    """
    path = folder / "record.jsonl"
    raw = path.read_bytes().split(b"\n") if path.exists() else []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            round = int(line["round"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(raw):  # no newline after it
                break
            raise RunError(f"{path}: line {number} is not a round: {error}") from error
        while lines and lines[-1]["round"] >= round:
            lines.pop()
        lines.append(line)
    return lines
