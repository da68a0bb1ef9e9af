"""When to synchronise: how long a round should be on a line.

A round of n local epochs costs n + rho of them, rho being its messages, and rounds to a target follow a / n + b, that is
(n + h) / n: more local work saves ever fewer rounds. So a run costs

    C(n) ~ (n + h) (n + rho) / n,     least at n* = sqrt(h rho)

h is not known beforehand. `fda` takes n* = (1.5 r rho^2)^(1/3), r = p / (2 - p), with p the exponent of the clients' drift,
E|u|^2 ~ n^p (sync/thresholds.py); the same n* is used here, with the pilot's p, and h = n*^2 / rho is what it amounts to.

Source: docs/fda.md (the law from sweeps of fixed intervals on six tasks; fda at 1.05 to 1.10 of the best of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from taciturn.advisor.part import MEASURED, Line, Part, Timing, keep, timing
from taciturn.advisor.pilot import Pilot
from taciturn.method import Method
from taciturn.sync import every, fda
from taciturn.sync.thresholds import adaptive

Change: TypeAlias = Callable[[Method], Method]

WITHIN = 1.1  # of the least predicted cost: what fda is within of the best interval, so no more can be promised
LONGEST = 10  # epochs of an interval advised to servers with a memory of steps (docs/fda.md, where rounds of 20 fail)
CHEAPEST = 0.5  # epochs that messages cost, below which the law was never measured (docs/fda.md: 1 to 100)
GRID = (1, 2, 3, 5, 10, 20, 40)


def exponent(drift: tuple[int, float, float]) -> float:
    """p of E|u|^2 ~ n^p from the drift after k and 2 k steps, held between 0.05 and 1.9; 1 where it is not finite.

    >>> exponent((5, 1.0, 2.0))
    1.0
    """
    _, short, long = drift
    if not (short > 0 and 0 < long < math.inf):
        return 1.0
    return min(max(math.log2(long / short), 0.05), 1.9)


def cost(n: float, best: float, rho: float) -> float:
    """C(n) / C(n*) for rounds of n epochs, h = n*^2 / rho.

    >>> round(cost(4.0, 2.0, 8.0), 3), cost(2.0, 2.0, 8.0)
    (1.08, 1.0)
    """
    h = best**2 / rho
    return (n + h) * (n + rho) / n / ((best + h) * (best + rho) / best)


def sync_part(pilot: Pilot, line: Line, up: float) -> Part:
    """every(..) or fda(), for messages of `up` bytes (those of the codec that is advised)."""
    now, rule = timing(pilot, line.clock, up, pilot.bytes_down), pilot.end.method.sync
    p, rho = exponent(pilot.end.drift), now.rho
    best = adaptive().goal(p, rho) if rho >= CHEAPEST else 0.0
    ratios = {n: cost(n, best, rho) for n in GRID} if best > 0 else {}
    mine = cost(now.epochs, best, rho) if best > 0 else 1.0
    numbers = {
        "round_seconds": now.seconds, "work_seconds": now.work, "epoch_seconds": now.epoch, "bytes_up": up,
        "bytes_down": pilot.bytes_down, "share": now.share, "rho": rho, "p": p, "epochs": now.epochs, "best_epochs": best,
        "cost": mine, "cost_of": {str(n): ratio for n, ratio in ratios.items()},
    }  # fmt: skip
    said = [
        f"On {line.told} a round takes {now.seconds:.3g} s, {now.work:.3g} s of it local work: messages take "
        f"{100 * now.share:.2g} %, as much as rho = {rho:.3g} local epochs. The slowest client sends {up:.0f} bytes in "
        f"{up / line.profile.up:.2g} s, gets {pilot.bytes_down:.0f} in {pilot.bytes_down / line.profile.down:.2g} s and "
        f"waits {line.profile.latency:.2g} s.",
        f"The clients' drift grows as n^p with p = {p:.2f} (two lengths of local work, measured).",
    ]
    choice, change, gain, why = _chosen(pilot, line, now, mine, best)
    sure = f"seconds predicted by the fleet's clock; p {MEASURED}; rounds a / E + b: rule of thumb (docs/fda.md)"
    rows = (("epochs a round", *map(str, ratios)), ("cost / least", *(f"{ratio:.2f}" for ratio in ratios.values())))
    changed = change is not keep and change(pilot.end.method).sync != rule
    return Part("sync", choice, sure, numbers, (*said, *why), rows if ratios else (), gain, change if changed else keep)


def _chosen(pilot: Pilot, line: Line, now: Timing, mine: float, best: float) -> tuple[str, Change, float, tuple[str, ...]]:
    """-> what is advised, the change, what a run then costs over what it costs now, and why."""
    rule = pilot.end.method.sync
    if not isinstance(rule, every):
        return f"{type(rule).__name__}, as it is", keep, 1.0, ("The rule finds its intervals itself.",)
    if not best:
        why = f"Messages cost less than {CHEAPEST} local epochs: the law was not measured there, nor are they dear."
        return "as it is", keep, 1.0, (why,)
    if mine <= WITHIN:
        why = f"Your {now.epochs:.3g} epochs a round cost {mine:.2f} of the least by that law; fda() is no nearer to it."
        return "as it is", keep, 1.0, (why,)
    if best < 1.5:
        return "every(epochs=1)", _fixed(1), 1 / mine, (f"About {best:.2g} epochs a round are best by that law.",)
    server = type(pilot.end.method.server).__name__
    if server not in ("sgd", "averaged") and best > LONGEST:
        why = (
            f"{best:.3g} epochs a round are best by that law, but servers with momentum ({server}) swing in rounds so long."
        )
        return f"every(epochs={LONGEST})", _fixed(LONGEST), cost(LONGEST, best, now.rho) / mine, (why,)
    latency, price = line.profile.latency, line.profile.price(pilot.end.times.step)
    alone = latency > now.epoch or line.clock.deadline is not None
    near = (
        f"About {best:.3g} epochs a round are best by that law, {1 / mine:.2f} of what yours cost; fda() finds them itself"
    )
    if alone:
        look = f"a look costs {latency:.3g} s, more than a local epoch ({now.epoch:.3g} s), so clients look at themselves"
        look = look if latency > now.epoch else "with a deadline the server cannot look, so clients look at themselves"
        rule_of = fda(monitor="local", price=price)
        return 'fda(monitor="local")', lambda m: m.replace(sync=rule_of), 1 / mine, (f"{near}; {look}.",)
    return "fda()", lambda m: m.replace(sync=fda(price=price)), 1 / mine, (f"{near}, within 1.05 to 1.10 of the best.",)


def _fixed(epochs: int) -> Change:
    def change(method: Method) -> Method:
        return method.replace(sync=every(epochs=epochs))

    return change
