"""The clients' half of a deployed run: a letter is read, the client works as client.py says, and a letter goes back.

What a client keeps are records of tensors in a folder of its own; between two letters nothing is in memory:

    FOLDER/RUN/client-000003/
      generation-000012.safetensors   what it owned and held after it had worked in round 12
      open.safetensors                the round in progress, where the server looks into it
      schemas.json                    what the frames that it gets look like
      seen.json                       the newest letter that it did

A letter that begins a round says from which generations to start: that in the frames' header is the last one that was
accepted; `copy` is that of the last model which it knows to have arrived. The client writes a further generation, deletes
those above the round (of a server that went back to a checkpoint) and those below `durable`, which no server can ask for
again. So an upload that was lost or refused leaves the client as it was, and no dual, memory or error is counted twice.

Symbols: everything is a block of one client; i its number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import RunError, WireError
from taciturn.core.random import Key
from taciturn.core.state import State, load_state, row, save_state, stack, tree_map, write_atomic
from taciturn.core.types import Payload, Record
from taciturn.core.vector import pieces_of
from taciturn.engines.letters import COMMANDS, EDITION, Letter, failed, introduced, most, read
from taciturn.engines.modes import one
from taciturn.engines.plain import Plain
from taciturn.engines.post import keeps_copies, narrowed, nothing_held, widened
from taciturn.engines.train import Job, Trainer
from taciturn.method import Method
from taciturn.wire.format import Frame, Schema, pack


@dataclass(frozen=True)
class Site:
    """What all clients of a site share. folder: their state. fingerprint: of the experiment; key: of the run; facts
    [N, ..]: of the clients' data, which the method asks for once. absent: clients whose data are at other sites; homes
    [N]: which site has each client, where that was agreed on.
    """

    work: Work
    method: Method
    key: Key
    folder: Path
    fingerprint: str = ""
    facts: Record = field(default_factory=dict)
    absent: frozenset[int] = frozenset()
    homes: tuple[int, ...] = ()

    def trainer(self) -> Trainer:
        """One client at a time, as the loopback engine has it."""
        way, key = Plain(self.work, one), random.fold(self.key, "client")
        return Trainer(self.work, self.method.sync, self.method.batch_size, key, way, one)


def answer(site: Site, letter: Letter) -> Letter:
    """Do what a letter says -> the reply; what failed is in its order, as "error"."""
    try:
        return _do(site, letter)
    except Exception as error:  # the user's model, or bytes that got past all checks: the site lives on
        return failed(letter, error)


def _do(site: Site, letter: Letter) -> Letter:
    order, command = letter.order, letter.order.get("command")
    if order.get("edition") != EDITION or order.get("fingerprint") != site.fingerprint:
        raise WireError(
            f"the server has edition {order.get('edition')} and experiment {order.get('fingerprint')!r}; this site has "
            f"{EDITION} and {site.fingerprint!r}: give both the same version and the same TOML"
        )
    if command not in COMMANDS:
        raise WireError(f"there is no command {command!r}; commands are {', '.join(COMMANDS)}")
    if not 0 <= letter.client < len(site.work.task.train.sizes):
        raise WireError(f"client {letter.client} is not at this site")
    if letter.client in site.absent:
        name = site.work.task.train.names[letter.client]
        raise RunError(f"client {letter.client} ({name!r}) has no data at this site; is data-path right?")
    if command == "hello":
        return letter.reply(_enrolment(site, letter.client))
    desk = _Desk(site, letter)
    desk.once()
    if command == "measure":
        return desk.measure()
    talk = desk.begun() if order.get("begins") else desk.resumed()
    return desk.observe(*talk) if command == "observe" else desk.collect(*talk)


def _enrolment(site: Site, i: int) -> tuple[bytes, ...]:
    """What the client tells once of its data: the frames of post.py's `enrol`."""
    payload = {"samples": site.work.task.train.sizes[i].clone()} | row(site.facts, i)
    return introduced(pack(Frame("setup", payload, 0, i)), Schema.of(payload), (), "setup")


def fitted(pattern: State, found: State, where: str) -> State:
    """A record that was read, with the empty parts that files do not keep. Errors: `RunError` for another shape."""
    if extra := found.keys() - pattern.keys():
        raise RunError(f"{where}: the record has {sorted(extra)}, and this experiment does not")
    whole: State = {}
    for name, like in pattern.items():
        mine = found.get(name, {} if isinstance(like, dict) else None)
        if isinstance(like, dict):
            whole[name] = fitted(like, mine, where) if isinstance(mine, dict) else None
        elif isinstance(mine, Tensor) and mine.shape == like.shape and mine.dtype == like.dtype:
            whole[name] = mine.to(like.device)
        if whole.get(name) is None:
            raise RunError(f"{where}: {name!r} is missing, or has another shape; it is of another experiment")
    return whole


class _Desk:
    """One client and one letter."""

    def __init__(self, site: Site, letter: Letter) -> None:
        self.site, self.letter, self.order = site, letter, letter.order
        self.i, self.ids = letter.client, torch.tensor([letter.client])
        name = str(self.order.get("run"))
        if not name.isalnum():
            raise WireError(f"a run is named by letters and digits; got {name!r}")
        self.round = int(self.order["round"])
        self.folder = site.folder / name / f"client-{self.i:06d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        kind_of = site.work.split.kind_of
        self.kind = 0 if kind_of is None else int(kind_of(self.round, self.ids))
        self.work = site.work.each_kind()[self.kind]

    # ------------------------------------------------------------------------------------------------------- the disk

    def once(self) -> None:
        """Refuse a letter that was done already, or that is of a server which was restarted since."""
        path, mine = self.folder / "seen.json", [int(self.order["session"]), int(self.order["number"])]
        with suppress(FileNotFoundError):
            if mine <= (seen := json.loads(path.read_bytes())):
                raise WireError(f"letter {mine} is no news: {seen} was done")
        write_atomic(path, [json.dumps(mine).encode()])
        if (kept := int(self.order["copy"])) and not self._path(kept).exists():
            raise RunError(
                f"what client {self.i} kept is gone: {self._path(kept)} is missing; to begin anew: taciturn deploy readmit"
            )

    def _path(self, generation: int) -> Path:
        return self.folder / f"generation-{generation:06d}.safetensors"

    def _generation(self, number: int) -> State:
        """{"own", "copy"} of a generation; 0: of a newcomer. Errors: `RunError` if it is gone."""
        split = self.work.split
        fresh = {"own": self.work.newcomer(), "copy": nothing_held(split.base, split.x0, self.site.method.broadcast)}
        if not number:
            return fresh
        state, _ = load_state(self._path(number))
        kept = fresh["copy"] | ({"x": split.x0} if "x" in state.get("copy", {}) else {})
        return fitted(fresh | {"copy": kept}, state, str(self._path(number).name))

    def _clear(self, needed: set[int], durable: int) -> None:
        """Delete what no server can ask for again, and what is of a future that did not happen."""
        for path in self.folder.glob("generation-*.safetensors"):
            number = int(path.stem.removeprefix("generation-"))
            if number not in needed and (number < durable or number > self.round):
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------ the letter

    def _frames(self) -> list[Frame]:
        """The messages of the letter; schemas that came are kept before anything is said."""
        path, schemas = self.folder / "schemas.json", dict[int, Schema]()
        with suppress(FileNotFoundError):
            for text in json.loads(path.read_bytes()):
                schema = Schema.parse(text.encode("ascii"))
                schemas[schema.id] = schema
        known = len(schemas)
        found = list(read(self.letter.frames, schemas, most(self.work.split)))
        if len(schemas) > known:
            write_atomic(path, [json.dumps([schema.text.decode() for schema in schemas.values()]).encode()])
        if any((frame.client, frame.round) != (self.i, self.round) for frame in found):
            raise WireError(f"a message that is not for client {self.i} in round {self.round}")
        device = self.work.split.x0.device
        return [
            Frame(f.kind, tree_map(lambda t: t.to(device), f.payload), f.round, f.client, f.generation, f.durable)
            for f in found
        ]

    def _applied(self, frames: list[Frame], copy: State) -> State:
        """What the client holds after these frames of the model; as `Post.model` has it."""
        split, part, broadcast = self.work.split, self.work.kind.holds, self.site.method.broadcast
        layout, pieces = (split.layout if part is None else part.layout), pieces_of(split.layout, split.kinds)
        copy = narrowed(copy, part)
        for frame in frames:
            if frame.payload:
                copy = broadcast.apply(copy, frame.payload, layout, pieces)
        if "x" not in copy:
            raise WireError(f"client {self.i} was sent no model, and holds none")
        return widened(copy, part)

    def _held(self, frames: list[Frame], kind: str) -> tuple[State, State, int, int]:
        """-> own record, model that is held, generation that the record is of, durable one."""
        models = [frame for frame in frames if frame.kind == kind]
        if not models:
            raise WireError("the letter begins with no model")
        start, durable, copy = models[0].generation, models[0].durable, int(self.order["copy"])
        own = self._generation(start)["own"]
        return own, self._applied(models, self._generation(copy)["copy"]), start, durable

    def begun(self) -> tuple[Trainer, State, Tensor | None]:
        """The round begins -> trainer, what must be known to go on, and steps that were told."""
        frames = self._frames()
        own, held, start, durable = self._held(frames, "model")
        self._clear({start, int(self.order["copy"])}, durable)
        told: Payload = {}
        for frame in frames:
            if frame.kind == "plan":
                own = own | {"knobs": frame.payload}
            if frame.kind == "monitor":
                told |= frame.payload
        steps = told.pop("steps", None)
        own, limit = stack([own]), torch.tensor([int(self.order["limit"])])
        trainer = self.site.trainer()
        trainer.begin(held, self.round, self.site.method.solver.schedule(self.round), told)
        talk = {"own": own, "held": held, "limit": limit, "signal": told, "durable": torch.tensor([start, durable])}
        return trainer, talk, None if steps is None else steps.reshape(1)

    def resumed(self) -> tuple[Trainer, State, Tensor | None]:
        """The round goes on, from what was written when the last letter was done."""
        steps = [frame.payload["steps"].reshape(1) for frame in self._frames() if frame.kind == "monitor"]
        found, meta = load_state(self.folder / "open.safetensors")
        if (meta["round"], meta["session"]) != (self.round, self.order["session"]):
            raise RunError(f"the letter goes on with round {self.round}, and round {meta['round']} is open")
        pattern = self.work.newcomer() | ({"knobs": row(found["own"]["knobs"], 0)} if "knobs" in found["own"] else {})
        found["own"] = stack([fitted(pattern, row(found["own"], 0), "open.safetensors")])
        talk: State = {"signal": {}} | found
        trainer = self.site.trainer()
        trainer.begin(talk["held"], self.round, self.site.method.solver.schedule(self.round), talk["signal"])
        live, done, local = (talk.pop(name) for name in ("live", "done", "local"))
        trainer.reopen(0, self._job(talk), live, done, _restored(local))
        return trainer, talk, steps[-1] if steps else None

    def _job(self, talk: State) -> Job:
        return Job(self.ids, talk["held"], talk["own"], talk["limit"], self.kind)

    # ----------------------------------------------------------------------------------------------------- the answers

    def _reply(self, kind: str, payload: Payload, stage: str = "setup", generation: int = 0, **facts: Any) -> Letter:
        data = pack(Frame(kind, payload, self.round, self.i, generation))
        return self.letter.reply(introduced(data, Schema.of(payload), self.order["met"], stage), **facts)

    def observe(self, trainer: Trainer, talk: State, steps: Tensor | None) -> Letter:
        """Local steps, and what the rule sees; the round stays open."""
        if steps is None:
            raise WireError("the letter does not say how many steps to do")
        began = time.perf_counter()
        payload, live = trainer.observe(0, self._job(talk) if self.order.get("begins") else None, steps.to(torch.int64))
        took, (done, local) = time.perf_counter() - began, trainer.opened(0)
        meta = {"round": self.round, "session": self.order["session"]}
        save_state(self.folder / "open.safetensors", talk | {"live": live, "done": done, "local": local}, meta)
        return self._reply("monitor", row(payload, 0), seconds=took)

    def collect(self, trainer: Trainer, talk: State, steps: Tensor | None) -> Letter:
        """The upload; what the client will own if it is accepted is written first."""
        stride, job = self.order.get("stride"), self._job(talk) if self.order.get("begins") else None
        upload = trainer.collect(0, job, None if stride is None else torch.tensor([int(stride)]), None)
        written = self.round + 1
        split, broadcast = self.work.split, self.site.method.broadcast
        copy = talk["held"] if keeps_copies(broadcast, split.layout, split.base, split.kinds) else {}
        save_state(self._path(written), {"own": row(upload.kept, 0), "copy": copy}, {"round": self.round})
        (self.folder / "open.safetensors").unlink(missing_ok=True)
        riders = {f"stats.{name}": value[0] for name, value in upload.stats.items()}
        return self._reply("update", row(upload.payload, 0) | riders, generation=written)

    def measure(self) -> Letter:
        """Sums on the client's own data; it does not keep the model."""
        own, held, _, _ = self._held(self._frames(), "evaluate")
        trainer = self.site.trainer()
        trainer.begin(held, self.round, 1.0, {})
        job = Job(self.ids, held, stack([own]), torch.zeros(1, dtype=torch.int64), self.kind)
        return self._reply("evaluate", row(trainer.measure(0, job, str(self.order["split"])), 0), "evaluate")


def _restored(local: State) -> Callable[[Plain, Any], Any]:
    return lambda way, part: way.restore(part, fitted(part.local, local, "open.safetensors"))
