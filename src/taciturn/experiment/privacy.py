"""What a run has spent of privacy: epsilon at a delta, by Renyi accounting of Gaussian mechanisms.

    central (aggregator = private)   a round: multiplier z = private.noise, Poisson sampling with rate q; who sees models
    clients (codec = clip, noise z)  a round: multiplier z sqrt(k / m), k messages accepted; no amplification
                                     and each message alone: z / sqrt(m); who sees messages, the server among them

The unit is a client with all its data: neighbours differ by one client (central), or by what one client trained on
(clients). Sizes of data sets, N and who took part count as known (central: who took part does not). A round in which
clients dropped out counts as a whole. Poisson sampling that draws nobody takes one client (participation.poisson), which
happens with probability (1 - q)^(N - 1) at most: T (1 - q)^(N - 1) (1 + e^epsilon) of delta are kept for it. The
accountant is that of opacus (Mironov 2017; Mironov, Talwar & Zhang 2019; conversion: Balle et al. 2020), an upper bound.
Needs `pip install 'taciturn[dp]'`.

In a simulation noise and cohorts follow from seeds, so the numbers are those of a real run, and nobody is protected. A
deployed run draws them anew when it goes on after a crash; its releases are counted in privacy.json before they are sent.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from taciturn.aggregation import private
from taciturn.codecs import clip
from taciturn.core.errors import ConfigError
from taciturn.core.state import write_atomic
from taciturn.experiment.experiment import Experiment
from taciturn.method import Method, is_silent
from taciturn.round import RoundStats

Spent = tuple[tuple[float, float, int], ...]  # (multiplier, rate, rounds) of each kind of round, as opacus has it
ORDERS = (*(1 + k / 10 for k in range(1, 100)), *range(12, 64), *range(64, 257, 16))
FILE = "privacy.json"


def epsilon(spent: Spent, delta: float) -> float:
    """The least epsilon that Renyi accounting finds; infinite for a multiplier of 0. Errors: `ConfigError`, no opacus."""
    return _epsilon(tuple(sorted(spent)), delta) if spent else 0.0


@lru_cache(maxsize=4096)
def _epsilon(spent: Spent, delta: float) -> float:
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise ConfigError(
            f"differential privacy needs the accountant of opacus ({error}): pip install 'taciturn[dp]'"
        ) from error
    if any(z == 0 for z, _, _ in spent):
        return math.inf
    accountant = RDPAccountant()
    accountant.history = list(spent)
    with warnings.catch_warnings():  # that an order at the end of the range is best: the bound holds all the same
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, alphas=list(ORDERS)))


def guarded(spent: Spent, delta: float, clients: int) -> float:
    """Epsilon at delta, less what is kept for rounds in which sampling would have drawn nobody."""
    rare = sum(rounds * (1 - q) ** max(clients - 1, 0) for _, q, rounds in spent if q < 1)
    found = epsilon(spent, delta)
    while rare > 0:
        left = delta - rare * (1 + math.exp(min(found, 700.0)))
        if left <= 0:
            return math.inf
        again = epsilon(spent, left)
        if again <= found * (1 + 1e-9):
            break
        found = again
    return found


def check(experiment: Experiment, method: Method, from_clients: bool, together: bool) -> None:
    """Errors: `ConfigError` for what an experiment would tell of clients without noise; together: blocks of several."""
    central, silent = isinstance(method.aggregator, private), is_silent(method.codec)
    if not (central or silent):
        return
    _epsilon(((1.0, 1.0, 1),), 1e-5)  # that it is there is found out before training
    if silent and (from_clients or experiment.evaluate_clients_every):
        raise ConfigError(
            "privacy: with codec = clip(noise ..) no client tells a metric of its data, and this run evaluates on clients; "
            "give the task a test set at the server, share all parameters, and set evaluate_clients_every = 0"
        )
    if experiment.stop_at.metric is not None and from_clients:
        raise ConfigError(
            "privacy: stop_at.metric ends the run by a metric of the clients' data, told without noise; use stop_at.bytes, "
            "or a number of rounds"
        )
    if together and getattr(method.codec, "secret", False):
        raise ConfigError('privacy: clip.secret draws for one client at a time; use engine = "sequential" or "loopback"')


@dataclass
class Budget:
    """The rounds that a run has released. begun: rounds in which clients may have sent; folder: of a run that is kept."""

    method: Method
    clients: int
    spent: dict[tuple[float, float], int] = field(default_factory=dict)
    begun: int = 0
    folder: Path | None = None

    @property
    def part(self) -> clip | private | None:
        """What the guarantee comes from."""
        codec, aggregator = self.method.codec, self.method.aggregator
        if isinstance(aggregator, private):
            return aggregator
        return codec if isinstance(codec, clip) and codec.silent else None

    @property
    def _secret(self) -> bool:
        return self.part is not None and self.part.secret and self.folder is not None

    def begin(self) -> None:
        """A round begins: from now on clients may send."""
        self.begun += 1
        self._write()

    def release(self, stats: RoundStats) -> None:
        """A round is done, and its model will be sent."""
        part = self.part
        if part is None:
            return
        kept = len(stats.ids) - len(stats.left_out)
        step = (part.noise, part.rate) if isinstance(part, private) else (part.noise * math.sqrt(kept / part.count), 1.0)
        self.spent[step] = self.spent.get(step, 0) + 1
        self._write()

    def _history(self) -> Spent:
        return tuple((z, q, rounds) for (z, q), rounds in self.spent.items())

    def _write(self) -> None:
        if self._secret and self.folder is not None:
            write_atomic(self.folder / FILE, [json.dumps({"begun": self.begun, "spent": self._history()}).encode()])

    def line(self) -> dict[str, Any]:
        """What the record keeps of a round: {"privacy": ..}, or {} where no guarantee is given; None: infinite."""
        part = self.part
        if part is None:
            return {}
        told = {"epsilon": guarded(self._history(), part.delta, self.clients), "delta": part.delta}
        if isinstance(part, clip):
            told["epsilon_message"] = epsilon(((part.message_noise, 1.0, self.begun),), part.delta)
        plain = {name: value if math.isfinite(value) else None for name, value in told.items()}
        return {"privacy": plain | {"begun": self.begun, "spent": [list(step) for step in self._history()]}}

    def restore(self, lines: Sequence[dict[str, Any]], folder: Path) -> None:
        """What was spent when the run stopped: by the record, or by its own file where rounds are not repeated alike."""
        self.folder = folder
        found = lines[-1].get("privacy", {}) if lines else {}
        if self._secret and (folder / FILE).exists():
            found = json.loads((folder / FILE).read_bytes())
        self.begun = found.get("begun", 0)
        self.spent = {(z, q): rounds for z, q, rounds in found.get("spent", [])}
