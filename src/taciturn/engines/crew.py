"""Who does the clients' half: this process, or several workers that each hold a trainer (train.py).

Blocks go to workers in turn: block n to worker n mod W, a few at a time; answers come back in the order of the blocks, so
that sums have the same bits for any number of workers. A worker that dies (memory, a lost machine) is replaced; what it
had been told in this round is said again, and what it had answered already is skipped: trainers keep nothing between
rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from taciturn.core.errors import RunError, TaciturnError
from taciturn.core.state import State, clone
from taciturn.engines.train import Job, Trainer, Upload

AHEAD = 2  # blocks that a worker has been asked for and has not answered


class Crew(Protocol):
    """Runs a trainer's methods somewhere."""

    @property
    def count(self) -> int:
        """How many blocks are worked on at once."""
        ...

    def begin(self, held: State, round: int, lr_scale: float, signal: State) -> None:
        """`Trainer.begin`, everywhere."""
        ...

    def each(self, command: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The trainer's method of that name for every (block number, ..) -> its results, in the order of the calls; None
        for clients that were not heard.
        """
        ...

    def there(self) -> Tensor | None:
        """Clients that can be reached now [N] bool; None: all."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


@dataclass(frozen=True)
class Alone:
    """The trainer in this process."""

    trainer: Trainer
    count: int = 1

    def begin(self, held: State, round: int, lr_scale: float, signal: State) -> None:
        """A new round."""
        self.trainer.begin(held, round, lr_scale, signal)

    def each(self, command: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """One after the other."""
        method = getattr(self.trainer, command)
        for arguments in calls:
            yield method(*arguments)

    def there(self) -> None:
        """All."""

    def close(self) -> None:
        """Nothing to let go."""


class Gone(Exception):
    """A worker is no more."""


class Worker(Protocol):
    """A trainer elsewhere: commands go in order, and so do answers. Errors: `Gone`."""

    def tell(self, command: str, *arguments: Any) -> None:
        """Send a command; does not wait for the answer."""
        ...

    def answer(self) -> Any:
        """The answer to the oldest command that has none yet; valid until the next answer of this worker is taken."""
        ...

    def close(self) -> None:
        """End it."""
        ...


@dataclass
class _Post:
    """A worker and this round's talk with it: what it was told, and how much of that it has answered."""

    worker: Worker
    told: list[tuple[Any, ...]] = field(default_factory=list)
    answered: int = 0


class Workers:
    """W workers; `hire` starts one, `share` puts the round's model where all of them can read it.

    lend: payloads may lie in a worker's memory until the next block is asked for; else they are copied. retries: how many
    deaths in a round are borne before it is given up.
    """

    def __init__(
        self, hire: Callable[[], Worker], share: Callable[[State], Any], count: int, lend: bool, retries: int = 3
    ) -> None:
        self._hire, self._share, self._lend, self._retries = hire, share, lend, retries
        self.count, self._posts, self.deaths = count, list[_Post](), 0

    def begin(self, held: State, round: int, lr_scale: float, signal: State) -> None:
        """A new round, for all."""
        self._posts = self._posts or [_Post(self._hire()) for _ in range(self.count)]
        self._bad, shared = 0, self._share(held)
        for post in self._posts:
            post.told, post.answered = [], 0
            self._tell(post, "begin", shared, round, lr_scale, signal)
        for post in self._posts:
            self._answer(post)

    def each(self, command: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the order of the calls, while every worker has up to `AHEAD` blocks to do."""
        waiting: deque[_Post] = deque()
        for number, *arguments in calls:
            post = self._posts[number % len(self._posts)]
            if len(waiting) == AHEAD * len(self._posts):
                yield self._kept(self._answer(waiting.popleft()))
            self._tell(post, command, number, *(_light(one) for one in arguments))
            waiting.append(post)
        while waiting:
            yield self._kept(self._answer(waiting.popleft()))

    def there(self) -> None:
        """All clients."""

    def close(self) -> None:
        """End all workers; the next round hires new ones."""
        for post in self._posts:
            post.worker.close()
        self._posts = []

    def _kept(self, found: Any) -> Any:
        """An answer without memory of the worker, but for payloads that are lent."""
        if not isinstance(found, Upload):
            return tuple(clone(one) for one in found) if isinstance(found, tuple) else clone(found)
        payload = found.payload if self._lend else clone(found.payload)
        return replace(found, payload=payload, stats=clone(found.stats), kept=clone(found.kept))

    def _tell(self, post: _Post, *message: Any) -> None:
        post.told.append(message)
        try:
            post.worker.tell(*message)
        except Gone:
            self._replace(post)

    def _answer(self, post: _Post) -> Any:
        while True:
            try:
                found = post.worker.answer()
                post.answered += 1
                return found
            except Gone:
                self._replace(post)

    def _replace(self, post: _Post) -> None:
        """Another worker, brought to where the last one was. Errors: `RunError` after too many deaths."""
        while True:
            self.deaths += 1
            self._bad += 1
            if self._bad > self._retries:
                raise RunError(
                    f"a worker died for the {self._bad}th time in one round; is there enough memory? Fewer workers or a "
                    "smaller block need less; the last checkpoint is kept"
                )
            try:
                post.worker.close()
                post.worker = self._hire()
                for place, message in enumerate(post.told):
                    post.worker.tell(*message)
                    if place < post.answered:
                        post.worker.answer()
                return
            except Gone:
                continue


def _light(argument: Any) -> Any:
    """A job without the model: workers were given it when the round began."""
    return replace(argument, held={}) if isinstance(argument, Job) else argument


# ------------------------------------------------------------------------------------------------- what workers share


def walk(tree: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """A tree of dicts, tuples and records with fn applied to every leaf of a kind."""
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, dict):
        return {name: walk(value, kind, fn) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(walk(value, kind, fn) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree)(**{f.name: walk(getattr(tree, f.name), kind, fn) for f in fields(tree)})
    return tree


def outcome(fn: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """(True, what fn gives) or (False, the error to raise where the answer is taken): our own as it is, others as text."""
    try:
        return True, fn(*arguments)
    except TaciturnError as error:
        return False, error
    except Exception as error:
        return False, RunError(f"a worker failed: {type(error).__name__}: {error}")
