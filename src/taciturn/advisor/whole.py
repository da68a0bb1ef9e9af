"""All parts of a method from one pilot: what each should be, when plain FedAvg is enough, and the method that follows.

Plain FedAvg (the user's own method without a codec) is enough where

    a budget is given        the whole run sends no more up than it
    else                     messages take less than QUIET of a round's time on the line
    or                       no part gains more than the pilot can tell

Parts are judged one at a time, sync with the messages of the codec that is advised; their sum was not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tomli_w

from taciturn.advisor.adapters import rank_part
from taciturn.advisor.bits import precision_part
from taciturn.advisor.homes import HEAD, personal_part
from taciturn.advisor.part import PREDICTED, Line, Part, keep, timing
from taciturn.advisor.pilot import Pilot
from taciturn.advisor.rank import Forecast, weigh
from taciturn.advisor.rounds import sync_part
from taciturn.codecs import identity
from taciturn.core import random
from taciturn.core.errors import TaciturnError
from taciturn.experiment.config import from_table, to_table
from taciturn.experiment.experiment import Experiment
from taciturn.method import Method
from taciturn.partition import lora

NAMES = ("codec", "sync", "rank", "personal", "precision", "lean")
QUIET = 0.1  # of a round's time, below which messages are not worth saving
TIE = 0.95  # a gain above it is none
FEW = 2000  # values, below which frames are most of what `Method.lean` sends


@dataclass(frozen=True)
class Whole:
    """plain: why plain FedAvg is enough, or ""; parts by name; method, toml: what is advised; notes: what was left out."""

    plain: str
    parts: dict[str, Part]
    method: Method
    toml: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """What the user wants: names of parts; budget: bytes up of all clients together, None where none is given."""

    names: tuple[str, ...]
    budget: float | None = None


def advised(method: Method, best: Forecast) -> Method:
    """The method with a codec and the server's step that it wants."""
    found = method.encoded(best.codec)
    if type(found.server).__name__ == "sgd" and best.factor != 1.0:
        found = found.replace(server=type(found.server)(lr=found.server.lr * best.factor))  # type: ignore[attr-defined, call-arg]
    return found


def whole_of(
    experiment: Experiment, pilot: Pilot, line: Line, ranked: Sequence[Forecast], tied: Sequence[str], asked: Asked
) -> Whole:
    """Look at every part that is asked for."""
    names, plain_up = asked.names, weigh(identity(), pilot, random.key(0))
    best = _codec(ranked, tied)
    enough = _enough(experiment, pilot, line, plain_up, asked)
    up = plain_up if enough or "codec" not in names else best.bytes
    codec = experiment.method.codec if "codec" not in names else identity() if enough else best.codec
    makers = {
        "codec": lambda: _codec_part(experiment.method, best, plain_up, tied),
        "sync": lambda: sync_part(pilot, line, up),
        "rank": lambda: rank_part(pilot, experiment),
        "personal": lambda: personal_part(pilot),
        "precision": lambda: precision_part(pilot, line, codec, up),
        "lean": lambda: _lean(experiment, pilot, plain_up),
    }
    parts = {name: makers[name]() for name in NAMES if name in names}
    if not enough and {"codec", "sync"} <= parts.keys() and not any(p.changes and p.gain < TIE for p in parts.values()):
        enough = "Plain FedAvg is enough: no part is predicted to gain more than the pilot can tell."
    head = "personal" in parts and parts["personal"].choice == HEAD
    if enough and head:
        enough = enough.replace("Plain FedAvg is enough", "For what it sends plain FedAvg is enough", 1)
        enough += " But one head for all serves nobody: the fragment has a personal head."
    method, notes = _joined(experiment, parts, bool(enough))
    return Whole(enough, parts, method, fragment(experiment, method), notes)


def _codec(ranked: Sequence[Forecast], tied: Sequence[str]) -> Forecast:
    """The best that is predicted; of a tie no compression, where it is in it."""
    return next((row for row in ranked if row.name == "identity" and row.name in tied), ranked[0])


def _enough(experiment: Experiment, pilot: Pilot, line: Line, up: float, asked: Asked) -> str:
    """Why nothing needs to be saved, or ""."""
    if asked.budget is not None:
        total = up * pilot.cohort_clients * experiment.rounds
        if total > asked.budget:
            return ""
        return (
            f"Plain FedAvg is enough: in {experiment.rounds} rounds it sends {total:.3g} bytes up, and the budget is "
            f"{asked.budget:.3g}."
        )
    now = timing(pilot, line.clock, up, pilot.bytes_down)
    if now.share >= QUIET:
        return ""
    return (
        f"Plain FedAvg is enough: on {line.told} messages take {100 * now.share:.2g} % of a round of {now.seconds:.3g} s, "
        f"less than {100 * QUIET:.0f} %. No codec, rule or rank can save more than that."
    )


def _codec_part(method: Method, best: Forecast, plain: float, tied: Sequence[str]) -> Part:
    same, found = best.name == "identity", advised(method, best)
    said = "No codec is told from no compression." if same else f"{plain / best.bytes:.1f} times fewer bytes up a round."
    numbers = {"bytes": best.bytes, "plain_bytes": plain, "rounds": best.rounds, "noise": best.noise, "step": best.factor}
    sure = f"{PREDICTED} from the pilot's messages (above)"
    change = keep if found == method else lambda method: advised(method, best)
    ties = (f"A tie with {', '.join(tied)}.",) if tied and not same else ()
    return Part("codec", best.name, sure, numbers, (said, *ties), (), best.bytes / plain, change)


def _lean(experiment: Experiment, pilot: Pilot, plain: float) -> Part:
    """What says the least: a candidate, with what docs/lean.md measured; this pilot predicts nothing of it."""
    sure = "not predicted (its codec is biased): measured on five other tasks, two seeds (docs/lean.md)"
    try:
        method = Method.lean(experiment.method)
        experiment.replace(method=method)
    except TaciturnError as error:
        return Part("lean", "does not fit", sure, {}, (f"Method.lean: {error}",))
    sent = weigh(method.codec, pilot, random.key(0))
    said = [
        f"Method.lean would send {sent:.0f} bytes up a message where float32 sends {plain:.0f} ({plain / sent:.3g} times "
        "less), and take up to four times as many rounds. It needed 35 to 129 times fewer bytes to FedAdam's target on "
        "five tasks, and reached it in all ten runs. Take it where bytes are all that counts, and measure: taciturn "
        "compare .. --methods fedavg,lean."
    ]
    if pilot.d < FEW:
        said.append(f"With {pilot.d} values frames are most of what it sends: not here.")
    numbers = {"bytes": sent, "plain_bytes": plain, "toml": fragment(experiment, method)}
    return Part("lean", "a candidate", sure, numbers, tuple(said))


# ---------------------------------------------------------------------------------------------------------- the method


def _joined(experiment: Experiment, parts: dict[str, Part], enough: bool) -> tuple[Method, tuple[str, ...]]:
    """The user's method with every change that is advised and fits; where plain FedAvg is enough without a codec, and
    with no change but a personal head.
    """
    method = experiment.method.encoded(identity()) if enough else experiment.method
    notes = []
    for name, part in parts.items():
        if not part.changes or (enough and name != "personal"):
            continue
        try:
            found = part.change(method)
            if name == "personal" and isinstance(method.partition, lora):
                found = method.replace(partition=replace(method.partition, also=(), personal="head"))
            experiment.replace(method=found)
        except TaciturnError as error:
            notes.append(f"{name}: {part.choice} does not go with the rest and is left out of the fragment: {error}")
            continue
        method = found
    return method, tuple(notes)


def fragment(experiment: Experiment, method: Method) -> str:
    """[method] whole, as TOML; it was loaded before it is shown, where the task can be."""
    table: dict[str, Any] = to_table(experiment.replace(method=method))
    if "custom" not in (table["data"]["name"], table["model"]["name"]):
        from_table(table)
    return tomli_w.dumps({"method": table["method"]})
