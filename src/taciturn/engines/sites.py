"""The server's half of a deployed run, beneath local.py: outboxes instead of a wire, sites instead of workers.

What the post sends down is packed and waits in the client's outbox; when the engine asks the crew, each client gets its
outbox as ONE letter with an order (letters.py), and what comes back is unpacked here. What the post is then told is what
arrived, so bytes are counted of the very frames that crossed the line. A client that is silent, late, broken or of another
version is lost for the round, and the reason kept; a second answer, or one to an older letter, is not looked at. Nothing
that a client says decides what is allocated or run: frames have the schema that the method gives, or they are refused.

The server keeps of a client the number of the generation that it accepted (site.py) in place of its record.
Symbols: i a client; blocks have one client.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import DataError, RunError, WireError
from taciturn.core.payload import nbytes
from taciturn.core.state import State, row, stack
from taciturn.core.types import Payload, Record, SyncRule
from taciturn.engines.letters import EDITION, Letter, Line, most, read
from taciturn.engines.post import Post
from taciturn.engines.rows import Rows
from taciturn.engines.store import ClientStore
from taciturn.engines.train import Job, Upload
from taciturn.sensitivity import MEASURED
from taciturn.wire.format import FRAME, Frame, Schema, pack, pack_schema

SECONDS = 600.0  # that a round, or an evaluation, may take
KIND = {"observe": "monitor", "collect": "update", "measure": "evaluate", "hello": "setup"}  # of the frame that answers
NEWCOMER = {"generation": torch.tensor(0)}  # what the server keeps of a client


@dataclass
class _Talk:
    """With one client in this round. limit, done: local steps; stretch: those of the last look."""

    client: int
    kind: int
    limit: int = 0
    done: int = 0
    stretch: int = 0


class Generations:
    """Which generations of a client's state no server may ask for again: those below one that is in every checkpoint kept.

    A generation is the number of rounds that are done with the one in which it was written. floors: of each client, at the
    rounds that it took part in since this process began, the oldest generation in use then.
    """

    def __init__(self, clients: ClientStore) -> None:
        self._clients = clients
        self._first: int | None = None
        self._floors: dict[int, list[tuple[int, int]]] = {}

    def durable(self, i: int, round: int, floor: int) -> int:
        """For a client that is to work in this round, where generations from `floor` on are in use."""
        if not self._clients.kept:
            return floor
        if self._first is None:
            self._first = round
        floors = self._floors.setdefault(i, [(self._first - 1, 0)])  # what was before is not known
        if floors[-1] != (round, floor):
            floors.append((round, floor))
        oldest = self._clients.oldest
        while len(floors) > 1 and floors[0][0] < oldest:
            floors.pop(0)
        return floors[0][1]


class Sites:
    """Carrier and crew (post.py, crew.py) over a line. run: names the clients' state; seconds: a round's deadline.

    carried: bytes of frames that crossed, up and down; orders: bytes of what was around them; silent: who was lost in this
    round, and why.
    """

    count = 1

    def __init__(
        self, line: Line, work: Work, sync: SyncRule, run: str, fingerprint: str, seconds: float = SECONDS
    ) -> None:
        self._line, self._work, self._rule, self._works = line, work, sync, work.each_kind()
        self._run, self._fingerprint, self._seconds = run, fingerprint, seconds
        self._session, self._number = int(time.time() * 1000), 0
        self.schemas: dict[int, Schema] = {}
        self.silent: dict[int, str] = {}
        self.carried, self.exchanges = {"up": 0, "down": 0}, 0
        self._outbox: dict[int, list[bytes]] = {}
        self._arrived: dict[tuple[int, str], int] = {}
        self._greeted: set[int] = set()
        self._talks: dict[int, _Talk] = {}
        self._expected: dict[Any, Schema] = {}

    def bind(self, own: Rows, post: Post, clients: ClientStore, facts: Record, asked: State) -> None:
        """What the server keeps of clients: generations that were accepted, and what they were sent.

        facts [N, ..]: what clients tell once beside their samples; asked: names of the knobs that they are told.
        """
        self._own, self._post, self._generations = own, post, Generations(clients)
        self._facts, self._knobs = facts, asked

    # ---------------------------------------------------------------------------------------------------- the carrier

    def introduce(self, schema: Schema, way: str, ids: Tensor) -> int:
        """Down: to these clients' outboxes. Up: it has arrived with the frame."""
        self.schemas[schema.id] = schema
        if way == "down":
            for i in ids.tolist():
                self._outbox.setdefault(i, []).append(pack_schema(schema))
        return len(schema.text)

    def move(self, way: str, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """Down: rows are packed and put in the outboxes. Up: they are what arrived; the bytes are those of the frames."""
        if way == "up":
            if kind == "setup":  # it came with the greeting, which is before the round
                return payload, nbytes(row(payload, 0)).expand(len(ids))
            return payload, torch.tensor([self._arrived.pop((i, kind)) for i in ids.tolist()])
        sizes = []
        for place, i in enumerate(ids.tolist()):
            own, copy = self._states(i)
            durable = self._generations.durable(i, round, min(own, copy)) if kind == "model" else 0
            data = pack(Frame(kind, row(payload, place), round, i, own, durable))
            self._outbox.setdefault(i, []).append(data)
            sizes.append(len(data) - FRAME)
        return payload, torch.tensor(sizes)

    def _states(self, i: int) -> tuple[int, int]:
        """Generations of a client: of its own record, and of the copy that it keeps."""
        ids = torch.tensor([i])
        return int(self._own.read(ids)["generation"]), int(self._post.copies(ids))

    # ------------------------------------------------------------------------------------------------------- the crew

    def there(self) -> Tensor:
        """Clients whose site can be reached [N] bool; those that are new are greeted. Errors: `DataError`, `RunError`."""
        mask = torch.zeros(len(self._work.task.train.sizes), dtype=torch.bool)
        ids = [i for i in self._line.there() if 0 <= i < len(mask)]
        if new := [i for i in ids if i not in self._greeted]:
            self._greet(new)
        for i in ids:
            mask[i] = i in self._greeted
        if not mask.any():
            why = "; ".join(sorted(set(self.silent.values()))) or "no site is connected"
            raise RunError(f"none of the {len(mask)} clients can be reached: {why}")
        return mask

    def _greet(self, new: list[int]) -> None:
        asked = [self._letter(i, "hello", 0, ()) for i in new]
        replies = self._exchange(asked, time.monotonic() + self._seconds)
        for letter in asked:
            payload = self._read("hello", letter, replies.get(letter.client), 0)
            if payload is None:
                continue
            mine, theirs = int(self._work.task.train.sizes[letter.client]), int(payload["samples"])
            if mine != theirs:
                raise DataError(
                    f"client {letter.client} has {theirs} training samples, and this experiment gives it {mine}; "
                    "are data and seed the same at the site?"
                )
            self._greeted.add(letter.client)

    def begin(self, held: State, round: int, lr_scale: float, signal: State) -> None:
        """A new round; who was lost in the last one may be heard again."""
        self._round, self._signal, self._talks, self.silent = round, signal, {}, {}
        self._deadline = time.monotonic() + self._seconds
        self._looks: list[tuple[float, int, float]] = []  # seconds of training, steps, other seconds

    def observed(self) -> tuple[float, float]:
        """Of the looks of this round: seconds of a step of a client, and of a look but for the steps; 0: of none."""
        seconds, steps, beside = (
            (sum(column) for column in zip(*self._looks, strict=True)) if self._looks else (0.0, 0, 0.0)
        )
        return seconds / steps if steps else 0.0, beside / max(1, len(self._looks))

    def _clocked(self, seconds: float, talks: list[_Talk], replies: dict[int, Letter]) -> None:
        """A look was answered. What clients say of their training is believed as far as time has passed; clients of one
        place work one after the other, and places at once.
        """
        busy: dict[int, float] = {}
        total, steps = 0.0, 0
        for talk in talks:
            told = replies[talk.client].order.get("seconds")
            if isinstance(told, float) and 0 < told < math.inf:
                told, place = min(told, seconds), self._line.place(talk.client)
                busy[place] = busy.get(place, 0.0) + told
                total, steps = total + told, steps + talk.stretch
        if busy:
            self._looks.append((total, steps, max(0.0, seconds - max(busy.values()))))

    def each(self, command: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """One letter to each client that has something to do, and their answers; None for a client that is not heard.

        A look may take half of the time that is left of the round: who is silent in it must not cost the others the rest.
        """
        asked = [self._asked(command, *call) for call in calls]
        began = time.monotonic()
        end = (began + self._deadline) / 2 if command == "observe" else self._deadline
        replies = self._exchange([letter for _, letter in asked if letter is not None], end)
        if command == "observe":
            self._clocked(time.monotonic() - began, [talk for talk, _ in asked if talk.client in replies], replies)
        for talk, letter in asked:
            found = None if letter is None else self._read(command, letter, replies.get(letter.client), talk.kind)
            yield None if found is None else self._found(command, found, talk)

    def close(self) -> None:
        """Nothing to let go."""

    def _asked(
        self, command: str, number: int, job: Job | None, given: Any = None, weights: Any = None
    ) -> tuple[_Talk, Letter | None]:
        """With whom a block of one is talked, and the letter; None if that client was lost, or stands still."""
        facts: dict[str, Any] = {}
        if job is not None:
            self._talks[number] = _Talk(int(job.ids[0]), job.kind, int(job.limit[0]))
            facts["begins"] = True
        talk = self._talks[number]
        i = talk.client
        if i in self.silent or (command == "observe" and talk.done >= talk.limit):
            return talk, None
        if command == "measure":
            facts["split"] = given
        elif command == "observe":
            talk.stretch = min(talk.limit - talk.done, int(given[0]))
            talk.done += talk.stretch
        elif given is not None:
            facts["stride"] = int(given[0])
        return talk, self._letter(i, command, self._round, self._outbox.pop(i, ()), limit=talk.limit, **facts)

    def _letter(self, i: int, command: str, round: int, frames: Iterable[bytes], **facts: Any) -> Letter:
        order = {"run": self._run, "session": self._session, "number": self._number + 1, "edition": EDITION}
        order |= {"fingerprint": self._fingerprint, "command": command, "round": round, "met": self._post.met(i)}
        return Letter(i, order | {"copy": self._states(i)[1]} | facts, tuple(frames))

    def _exchange(self, letters: list[Letter], deadline: float) -> dict[int, Letter]:
        """The first answer of each client to its letter, if it came in time."""
        self._number += 1
        self.exchanges += bool(letters)
        self._outbox.clear()
        if not letters:
            return {}
        self.carried["down"] += sum(letter.size for letter in letters)
        waiting = {letter.client: letter.identity for letter in letters}
        replies: dict[int, Letter] = {}
        for reply in self._line.exchange(letters, max(0.0, deadline - time.monotonic())):
            if waiting.get(reply.client) == reply.identity:
                del waiting[reply.client]
                replies[reply.client] = reply
                self.carried["up"] += reply.size
        return replies

    def _found(self, command: str, payload: Payload, talk: _Talk) -> Any:
        """What the trainer's method would have given."""
        payload = stack([payload])
        if command == "measure":
            return payload
        if command == "observe":
            return payload, torch.tensor([talk.done < talk.limit])
        stats = {name.removeprefix("stats."): value for name, value in payload.items() if name.startswith("stats.")}
        update = {name: value for name, value in payload.items() if not name.startswith("stats.")}
        return Upload(update, stats, {"generation": torch.tensor([self._round + 1])})

    # ------------------------------------------------------------------------------------------------- what came back

    def _read(self, command: str, letter: Letter, reply: Letter | None, kind: int) -> Payload | None:
        """The payload of an answer; None if there is none that can be used, and then the client is lost."""
        i = letter.client
        if reply is None:
            self.silent[i] = "no answer in time"
        elif error := reply.order.get("error"):
            self.silent[i] = f"{error}"[:500]
        else:
            try:
                return self._checked(command, letter, reply, kind)
            except WireError as error:
                self.silent[i] = f"its answer cannot be read: {error}"
        return None

    def _checked(self, command: str, letter: Letter, reply: Letter, kind: int) -> Payload:
        """The payload of the one message of a reply. Errors: `WireError`."""
        if reply.order.get("edition") != EDITION:
            raise WireError(f"edition {reply.order.get('edition')}; this server has {EDITION}")
        expected, schemas = self._schema(command, kind), dict(self.schemas)
        found = list(read(reply.frames, schemas, most(self._work.split)))
        if len(found) != 1:
            raise WireError(f"{len(found)} messages instead of one")
        frame = found[0]
        if (frame.kind, frame.client, frame.round) != (KIND[command], letter.client, letter.order["round"]):
            raise WireError(f"a message {frame.kind!r} of client {frame.client} in round {frame.round}")
        if Schema.of(frame.payload).id != expected.id:
            raise WireError(f"a message of another schema than {expected.text.decode():.200}")
        self.schemas[expected.id] = expected
        self._arrived[letter.client, frame.kind] = len(reply.frames[-1]) - FRAME
        device = self._work.split.x0.device
        return {name: tensor.to(device) for name, tensor in frame.payload.items()}

    def _schema(self, command: str, kind: int) -> Schema:
        """What clients of a kind answer with, from the method and the model."""
        place = command, kind
        if place not in self._expected:
            self._expected[place] = Schema.of(self._example(command, self._works[kind]))
        return self._expected[place]

    def _example(self, command: str, work: Work) -> Payload:
        """An answer of a client that has done nothing."""
        if command == "hello":
            return {"samples": work.task.train.sizes[0]} | row(self._facts, 0)
        own, x0 = work.newcomer(), work.split.x0
        if command == "measure":
            zero = torch.zeros(1, dtype=torch.int64)
            batch = row(work.task.train.fetch(zero, zero.unsqueeze(0)), 0) | {"mask": torch.ones(1, dtype=torch.bool)}
            views = work.split.layout.views(x0), work.split.personal.views(own["v"]), work.split.buffers.views(own["b"])
            held = {"x": x0} | ({"base": work.split.base.views(x0.new_zeros(work.split.base.d))})
            params = work.params(held, *views)
            return {name: value.float() for name, value in work.task.measure(params, batch).items()}
        local, u = client.begin(work, x0, own), torch.zeros_like(x0)
        told = {name: local[name] for name in ("done", "loss")}
        if command == "observe":
            return self._rule.observe(u, told, self._signal)[0]
        payload, stats, _ = client.collect(work, local, u, own, random.key(0))
        rode = self._rule.observe(u, told, self._signal)[0] if self._rule.observer == "client" else {}
        rode |= dict.fromkeys(MEASURED, torch.zeros(())) if "gap" in self._knobs else {}
        return payload | {f"stats.{name}": value for name, value in (stats | rode).items()}
