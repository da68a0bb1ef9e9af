"""Sites in this process behind a line that only carries bytes: every message starts from what is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from taciturn.client import Work
from taciturn.core import random
from taciturn.engines.letters import Letter, order_of, order_text
from taciturn.engines.site import Site, answer
from taciturn.engines.sites import Sites


class FakeLine:
    """spoil: sees every letter (way, letter) and gives what arrives of it: none, one or several letters."""

    def __init__(self, site: Site, clients: int) -> None:
        self.site, self.clients, self.log, self.greetings = site, clients, [], dict[int, int]()
        self.spoil: Callable[[str, Letter], list[Letter]] = lambda way, letter: [letter]

    def there(self) -> range:
        return range(self.clients)

    def place(self, client: int) -> int:
        return 0

    def exchange(self, letters, seconds) -> Iterator[Letter]:
        for sent in letters:
            for letter in self.spoil("down", self._copied(sent)):
                self.log.append(("down", letter))
                reply = self._copied(answer(self.site, letter))
                self.log.append(("up", reply))
                if letter.order["command"] == "hello":
                    self.greetings[letter.client] = reply.size
                yield from self.spoil("up", reply)

    def _copied(self, letter: Letter) -> Letter:
        """Through text and bytes."""
        frames = tuple(bytes(bytearray(frame)) for frame in letter.frames)
        return Letter(letter.client, order_of(order_text(letter.order)), frames)


def site_of(task, method, folder: Path, seed: int = 0) -> Site:
    """The site that has all clients of a task."""
    split = method.split(task.model, task.tracked)
    return Site(Work(task, split, method.solver, method.codec), method, random.key(seed), folder, "exp")


def line_of(task, method, folder: Path) -> FakeLine:
    return FakeLine(site_of(task, method, folder), len(task.train.sizes))


def sites_of(line: FakeLine, method, seconds: float = 60.0) -> Sites:
    return Sites(line, line.site.work, method.sync, "run1", line.site.fingerprint, seconds)
