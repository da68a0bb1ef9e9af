"""`taciturn advise`: candidates by name, their forecasts ranked, ties said aloud, and the winner as TOML.

Symbols: B samples of the bootstrap; rho heterogeneity of the messages; Q bytes times noise (rank.py).
Two codecs are TIED where the bootstrap's 90 % interval of their difference holds 0, or they differ by less than CLOSE:
the pilot cannot tell them apart, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import tomli_w
import torch

from taciturn.advisor.law import Law, law_of
from taciturn.advisor.part import line_of, timing
from taciturn.advisor.pilot import Pilot, run_pilot
from taciturn.advisor.rank import CONFIDENCE, Budget, Forecast, forecasts, memory_gain, weigh
from taciturn.advisor.whole import NAMES, Asked, Whole, advised, whole_of
from taciturn.codecs import identity
from taciturn.core import random
from taciturn.core.errors import ConfigError, require, unknown
from taciturn.experiment.config import PARTS, build_part, from_table, to_table
from taciturn.experiment.experiment import Experiment
from taciturn.experiment.spelled import spelled
from taciturn.method import Method

CLOSE = 0.01
CANDIDATES: dict[str, str] = {
    "identity": "identity",
    "float16": "cast(dtype=float16)",
    "quantize8": "quantize8",
    "quantize4": "quantize4",
    "quantize2": "quantize(bits=2)",
    "quantize8 block": "quantize(bits=8, scale=block)",
    "quantize4 block": "quantize(bits=4, scale=block)",
    "quantize2 block": "quantize(bits=2, scale=block)",
    "quantize4 rotated": "rotated(codec=quantize4)",
    "qsgd": "qsgd",
    "sparsify 1/4": "sparsify(p=0.25)",
    "rand_k 1/4": "rand_k(share=0.25)",
    "sketch 1/4": "sketch(share=0.25)",
    "partial 1/4": "partial(p=0.25)",
}
LIMITS = (
    "Only unbiased codecs whose noise is independent between clients are predicted: no top_k, sign or lowrank, with or "
    "without error feedback.",
    "Only the way up is compressed and counted in --budget; --link counts both ways.",
    "The law of the messages is that of the pilot's end. Far from there it is another: advise again from a later point.",
    "The loss is a quadratic around the pilot's end; slow directions (1/(gamma lambda) rounds beyond the budget) are "
    "predicted as unfinished, not as converged. Trust the order more than the figures.",
    "The server's step is taken to be plain SGD, tuned for each codec; adaptive servers and solvers are predicted by "
    "their fitted step only.",
    "omega alone ranks nothing: codecs of equal omega may differ by orders of magnitude in what they cost.",
)


def parse_codec(text: str, where: str = "--codecs") -> Any:
    """ "rotated(codec=quantize(bits=4), block=64)" -> the codec. Errors: `UnknownName`, `ConfigError`."""
    return build_part("codec", spelled(text, where), where)


def candidates(names: Sequence[str] | None) -> dict[str, Any]:
    """Codecs by label: CANDIDATES that this version has, or those asked for (labels, or as `parse_codec` reads them)."""
    if names is None:
        known = {label: text for label, text in CANDIDATES.items() if text.partition("(")[0] in PARTS["codec"]}
        return {label: parse_codec(text) for label, text in known.items()}
    require(len(names) > 0, "--codecs: name at least one codec, for example quantize8,rand_k(share=0.25)")
    return {name: parse_codec(CANDIDATES.get(name, name)) for name in names}


# ------------------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class Advice:
    """ranked: predicted codecs, best first; tied: names that cannot be told from the best; apart: those not predicted.

    toml: of the codec alone; whole: all parts, whether plain FedAvg is enough, and the method that is advised; seconds:
    that looking at the parts took, beside the pilot and the codecs.
    """

    ranked: tuple[Forecast, ...]
    tied: tuple[str, ...]
    apart: tuple[Forecast, ...]
    reasons: tuple[str, ...]
    toml: str
    by: str
    budget: Budget
    known: Law
    whole: Whole
    seconds: float

    @property
    def method(self) -> Method:
        """The advised method, all parts."""
        return self.whole.method

    @property
    def best(self) -> Forecast:
        """The recommendation."""
        return self.ranked[0]

    def table(self) -> dict[str, Any]:
        """Everything as plain numbers and words, for JSON (what is unknown or infinite is null)."""
        hidden = ("codec", "paired", "paired_seconds")
        plain = [
            {f.name: _json(getattr(row, f.name)) for f in fields(row) if f.name not in hidden}
            for row in (*self.ranked, *self.apart)
        ]
        p = self.known.pilot
        facts: dict[str, Any] = {
            "d": p.d,
            "loss": p.loss,
            "gamma": p.gamma,
            "steps": p.steps,
            "cohort": p.cohort_clients,
            **p.cost,
        }
        facts |= {"rho": self.known.rho, "curvature": self.known.basis.note}
        return {
            "recommended": self.best.name, "tied": list(self.tied), "ranked_by": self.by, "codecs": plain,
            "budget": {"bytes_up": self.budget.bytes, "mbit": self.budget.mbit, "latency": self.budget.latency},
            "pilot": facts, "reasons": list(self.reasons), "limits": list(LIMITS), "toml": self.toml,
            "plain": self.whole.plain, "method": self.whole.toml, "notes": list(self.whole.notes), "seconds": self.seconds,
            **{name: _json(part.table()) for name, part in self.whole.parts.items()},
        }  # fmt: skip


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def advise(
    experiment: Experiment,
    *,
    codecs: Sequence[str] | None = None,
    budget: float | None = None,
    mbit: float | None = None,
    latency: float = 0.0,
    pilot_rounds: int | None = None,
    parts: Sequence[str] | None = None,
) -> Advice:
    """Run a pilot, rank codecs for this experiment, and look at the other parts of its method.

    budget: bytes up of all clients together (what the experiment would send without compression, unless given): ranked by
    the loss at its end. mbit, latency (seconds): of each client's link: ranked by the time to the loss that the run
    without compression is predicted to reach. parts: those to look at (all; without "codec" none but identity is ranked);
    their seconds are those of the experiment's fleet, on the link where one is given. Errors: `ConfigError` for both or for
    nonsense; those of the pilot.
    """
    require(
        budget is None or mbit is None, "advise: give --budget (bytes) or --link (time), not both; they rank differently"
    )
    require(budget is None or budget > 0, f"--budget: above 0 bytes; got {budget}")
    require(mbit is None or mbit > 0, f"--link: above 0 Mbit/s; got {mbit}")
    require(latency >= 0 and (mbit is not None or latency == 0), "--latency: at least 0 ms, and only together with --link")
    names = _parts(parts)
    chosen = candidates(codecs if "codec" in names else ["identity"])
    found = run_pilot(experiment, pilot_rounds)
    known = law_of(found)
    plain = weigh(identity(), found, random.key(0)) * found.cohort_clients
    spent = budget if budget is not None else plain * experiment.rounds
    line = line_of(found, mbit, latency, _fleet(experiment))
    limit = Budget(spent, mbit, latency, timing(found, line.clock, 0.0, 0.0).work)
    require(
        spent >= plain * (len(found.curve) - 1) / 4,
        f"--budget: {spent:.3g} bytes are less than a quarter of what the pilot itself would send up; give more, or fewer "
        "pilot rounds (--pilot)",
    )
    options: dict[str, Any] = {"base": identity(), "target_rounds": experiment.rounds}
    rows = forecasts(known, chosen, limit, **options)
    by = "seconds" if mbit is not None else "loss"
    ranked, apart = order(rows, by)
    require(bool(ranked), f"advise: nothing can be predicted of {', '.join(chosen)}; name an unbiased codec too")
    word, extra = _memory(known, ranked[0], found)
    if extra is not None:
        ranked, _ = order([*ranked, *forecasts(known, extra, limit, **options)], by)
    tied = tuple(row.name for row in ranked[1:] if tie(ranked[0], row, by))
    toml = _toml(experiment, ranked[0])
    reasons = (*_reasons(ranked, tied, known, limit, word, by), *_server(type(experiment.method.server).__name__))
    began = time.perf_counter()
    whole = whole_of(experiment, found, line, ranked, tied, Asked(names, budget))
    return Advice(ranked, tied, apart, reasons, toml, by, limit, known, whole, time.perf_counter() - began)


def _fleet(experiment: Experiment) -> str:
    """Its name, "" where none is given."""
    return experiment.fleet if isinstance(experiment.fleet, str) else "of your own" if experiment.fleet else ""


def _parts(names: Sequence[str] | None) -> tuple[str, ...]:
    """Parts by name, all of them unless given. Errors: `UnknownName`."""
    for name in names or ():
        if name not in NAMES:
            raise unknown("part", name, NAMES, "--part")
    return NAMES if not names else tuple(name for name in NAMES if name in names)


def order(rows: Sequence[Forecast], by: str) -> tuple[tuple[Forecast, ...], tuple[Forecast, ...]]:
    """Forecasts by "loss" or "seconds", best first; and those that are not predicted."""

    def place(row: Forecast) -> tuple[float, float]:
        return (row.seconds if by == "seconds" else row.loss, row.loss)

    return tuple(sorted((r for r in rows if not r.why), key=place)), tuple(r for r in rows if r.why)


def tie(best: Forecast, other: Forecast, by: str) -> bool:
    """True if the pilot cannot tell that `best`, which is predicted to be ahead, is ahead."""
    a, b = (row.paired_seconds if by == "seconds" else row.paired for row in (best, other))
    assert a is not None and b is not None
    if not bool(torch.isfinite(b[0])):
        return False
    gap = torch.where(torch.isfinite(b) & torch.isfinite(a), b - a, float(b[0]))
    low = float(torch.quantile(gap, (1 - CONFIDENCE) / 2))
    return low <= 0 or float(b[0] - a[0]) < CLOSE * abs(float(a[0]))


def _memory(known: Law, best: Forecast, found: Pilot) -> tuple[str, dict[str, Any] | None]:
    """What to say of memory for the best codec, and that codec with memory where it pays."""
    spread = f"rho = {known.rho:.2g} ({known.rho_low:.2g} to {known.rho_high:.2g})"
    inner = best.codec
    if not inner.lossy or best.memory or best.noise < 1e-3:
        return f"Memory (difference) has nothing to remove: {best.name} adds no noise to speak of; {spread}.", None
    omega = inner.omega(found.d)
    if not math.isfinite(omega):
        return f"Memory (difference) needs a codec with a finite omega; {best.name} has none; {spread}.", None
    alpha = 1 / (2 * (omega + 1))
    gain = memory_gain(known, inner, alpha)
    low, high = torch.quantile(gain, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    said = (
        f"noise with memory over without, at alpha = {alpha:.2g}: {float(gain[0]):.2f} ({low:.2f} to {high:.2f}); {spread}"
    )
    settled = alpha * found.share * best.rounds
    if low <= 1 <= high:
        return f"Memory (difference): undecided, {said}.", None
    if low > 1:
        return f"Memory (difference) would do harm: the clients' messages are noise more than difference. {said}.", None
    if settled < 3:
        return (
            f"Memory (difference) would pay, but needs about {3 / (alpha * found.share):.0f} rounds to settle. {said}.",
            None,
        )
    named = (
        {f"{best.name} + memory": PARTS["codec"]["difference"](codec=inner, alpha=alpha)}
        if "difference" in PARTS["codec"]
        else None
    )
    return f"Memory (difference) pays: {said}.", named


def _toml(experiment: Experiment, best: Forecast) -> str:
    """The fragment that makes the experiment use the codec; it was loaded before it is shown."""
    method = advised(experiment.method, best)
    table = to_table(experiment.replace(method=method))
    changed = ["codec"] + [n for n in ("server", "aggregator") if getattr(method, n) != getattr(experiment.method, n)]
    part = {name: table["method"][name] for name in changed}
    if "custom" not in (table["data"]["name"], table["model"]["name"]):
        from_table(table)
    return tomli_w.dumps({"method": part})


# -------------------------------------------------------------------------------------------------------------- words


def _reasons(
    ranked: Sequence[Forecast], tied: Sequence[str], known: Law, budget: Budget, memory: str, by: str
) -> tuple[str, ...]:
    best, pilot = ranked[0], known.pilot
    plain = weigh(identity(), pilot, random.key(0))
    said = [
        f"{best.name} sends {best.bytes:.0f} bytes a message where float32 sends {plain:.0f} "
        f"({plain / best.bytes:.1f} times less), so the budget buys {best.rounds} rounds; its noise is "
        f"{100 * best.noise:.2g} % of what a message then carries, minibatches included."
    ]
    if best.factor != 1.0:
        said.append(f"It wants {best.factor:g} times the server's step: the fragment sets it.")
    if tied:
        said.append(f"The pilot cannot tell it from {', '.join(tied)}: a tie, not a ranking. Take whichever is simplest.")
    if by == "seconds" and not math.isfinite(best.seconds):
        said.append("No codec is predicted to reach the target; the order is that of the loss at the budget.")
    calm = min(ranked, key=lambda row: row.ratio)
    if calm.ratio < 0.9 * best.ratio and calm.name not in tied:
        said.append(
            f"In the long run {calm.name} costs least per byte (Q = {calm.ratio:.2g} against {best.ratio:.2g}): with a "
            "much larger budget, or near the optimum, ask again."
        )
    flips = [r.name for r in ranked if min(r.ratio_damping) < 1 < max(r.ratio_damping)]
    if flips:
        said.append(
            f"Whether {', '.join(flips)} gains per byte in the long run depends on the damping of the curvature: undecided."
        )
    said.append(memory)
    if known.tails < 0.75:
        said.append(f"Heavy tails: the median of means is {known.tails:.2f} of the mean; intervals are too narrow.")
    if pilot.gamma_note != "the solver's lr":
        said.append(f"Step size {pilot.gamma:.3g}: {pilot.gamma_note}.")
    return tuple(said)


def _server(name: str) -> tuple[str, ...]:
    if name == "sgd":
        return ()
    if name == "averaged":
        return ("The server averages its iterates; the losses are those of the last one. Q is about the average.",)
    return (f"The server is {name}; the forecast takes plain SGD steps in its place, so trust it less.",)


def parse_bytes(text: str) -> float:
    """ "10MB" -> 1e7; plain numbers are bytes. Errors: `ConfigError`."""
    units: Mapping[str, float] = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0, "": 1.0}
    number = text.strip().lower().rstrip("kmgb")
    try:
        return float(number) * units[text.strip().lower()[len(number) :]]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"--budget: got {text!r}; write bytes, or for example 500kB, 10MB, 2GB") from error
