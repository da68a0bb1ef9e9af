"""The numbers of a report: pure functions from runs to rows.

Symbols and units:
    target      a value of the metric; a run reaches it in its first evaluated round at least as good
    bytes       up + down, payload + frame, without evaluation; 1 kB = 1000 B
    method      the runs of one name and configuration; several seeds give a mean and a sample standard deviation
    scenario    the runs on one and the same data, by their configurations; it has a target and a baseline of its own
    baseline    the first method given of a scenario
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taciturn.core.errors import RunError
from taciturn.experiment.result import worst_decile as worst_tenth
from taciturn.report.read import Run, number, simulated

# Values of a configuration that seeds of one method may differ in; a "seed" may differ wherever it stands.
FREE = ("name", "engine", "block", "device", "target", "checkpoint_every", "evaluate_every", "evaluate_clients_every")
SLACK = 0.02  # the default target is this fraction worse than the baseline's best


@dataclass(frozen=True, slots=True)
class Method:
    """The runs of one name, one for each seed; `label` is unique in a report; `scenario` is "" where there is only one.
    place: among the names without scenarios, so that a method has one color in all of them.
    """

    label: str
    runs: tuple[Run, ...]
    scenario: str = ""
    place: int = 0

    @property
    def short(self) -> str:
        """The label without the name of the scenario."""
        return self.label.removesuffix(f", {self.scenario}") if self.scenario else self.label


@dataclass(frozen=True, slots=True)
class Saved:
    """The fraction of the baseline's bytes that was not sent (negative: more was sent), and what was compared."""

    fraction: float | None
    basis: str


def human_bytes(count: float) -> str:
    """A number of bytes with three digits and an SI unit.

    >>> human_bytes(512), human_bytes(3_100_000), human_bytes(999_999)
    ('512 B', '3.1 MB', '1 MB')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    places = 0 if units[0] == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{places}f}"
    return f"{text.rstrip('0').rstrip('.') if places else text} {units[0]}"


UNITS = (("s", 1.0), ("min", 60.0), ("h", 3600.0), ("d", 86400.0))


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that a time is read in, and its seconds.

    >>> time_unit(90), time_unit(250), time_unit(1e5)
    (('s', 1.0), ('min', 60.0), ('h', 3600.0))
    """
    return next(((name, unit) for name, unit in reversed(UNITS) if seconds >= 2 * unit), UNITS[0])


def human_seconds(seconds: float) -> str:
    """A time with three digits and its unit.

    >>> human_seconds(0.1234), human_seconds(90), human_seconds(8000)
    ('0.123 s', '90 s', '2.22 h')
    """
    name, unit = time_unit(seconds)
    return f"{seconds / unit:.3g} {name}"


def curve(run: Run) -> list[tuple[int, float, int]]:
    """(round, value of the run's metric, cumulative bytes) of every evaluated round with a finite value."""
    points = []
    for line in run.rounds:
        value = number((line.get("metrics") or {}).get(run.metric))
        if value is not None:
            points.append((int(line["round"]), value, int(line["bytes_up"] + line["bytes_down"])))
    return points


def time_curve(run: Run) -> list[tuple[int, float, float]]:
    """(round, value of the run's metric, simulated seconds) of every evaluated round that has them."""
    at = {int(line["round"]): simulated(line) for line in run.rounds}
    return [(round, value, seconds) for round, value, _ in curve(run) if (seconds := at[round]) is not None]


def seconds_to(run: Run, target: float | None) -> float | None:
    """Simulated seconds until the first evaluated round that is at least as good as `target`; None if there is none."""
    at = rounds_to(run, target)
    return None if at is None else next((seconds for round, _, seconds in time_curve(run) if round == at), None)


def best(run: Run) -> float | None:
    """The best value of the metric in any evaluated round; None if the run was never evaluated."""
    values = [value for _, value, _ in curve(run)]
    return None if not values else max(values) if run.goal == "max" else min(values)


def final(run: Run) -> float | None:
    """The value of the metric in the last evaluated round; None if the run was never evaluated."""
    points = curve(run)
    return points[-1][1] if points else None


def is_fraction(runs: Sequence[Run]) -> bool:
    """Whether the metric reads as a percentage: goal max, and every value in [0, 1]."""
    values = [value for run in runs for _, value, _ in curve(run)]
    return bool(values) and all(run.goal == "max" for run in runs) and all(0 <= value <= 1 for value in values)


def final_error(run: Run) -> float | None:
    """1 - metric for a metric in [0, 1] with goal max, else the metric itself, in the last evaluated round."""
    value = final(run)
    return value if value is None or not is_fraction([run]) else 1 - value


def _reach(run: Run, target: float | None) -> tuple[int, int] | None:
    for at, value, count in curve(run):
        if target is not None and (value >= target if run.goal == "max" else value <= target):
            return at, count
    return None


def rounds_to(run: Run, target: float | None) -> int | None:
    """The first evaluated round that is at least as good as `target`; None if there is none."""
    reached = _reach(run, target)
    return reached and reached[0]


def bytes_to(run: Run, target: float | None) -> int | None:
    """Bytes up and down until the first evaluated round that is at least as good as `target`; None if there is none."""
    reached = _reach(run, target)
    return reached and reached[1]


def clients_of(run: Run) -> list[tuple[str, float]]:
    """(client, value of the metric) in the last per-client evaluation; empty if there was none."""
    for line in reversed(run.rounds):
        spread = line.get("spread") or {}
        if run.metric in spread:
            names = spread.get("names") or [run.client(index) for index in spread["ids"]]
            pairs = zip(names, map(number, spread[run.metric]), strict=True)
            return [(str(name), value) for name, value in pairs if value is not None]
    return []


def worst_decile(run: Run) -> float | None:
    """Mean of the metric over the worst tenth of clients in the last per-client evaluation; None if there is none."""
    return worst_tenth([value for _, value in clients_of(run)], run.goal)


def left_out(run: Run) -> int:
    """How often a client of a cohort was left out of the mean, in the whole run."""
    return sum(len(line.get("left_out") or []) for line in run.rounds)


def by_kind(run: Run) -> dict[str, dict[str, int]]:
    """ "direction/kind" -> bytes of payload, bytes of frame and messages, summed over all rounds."""
    totals: dict[str, dict[str, int]] = {}
    for line in run.rounds:
        for kind, counts in ((line.get("traffic") or {}).get("by_kind") or {}).items():
            entry = totals.setdefault(kind, {"payload": 0, "frame": 0, "messages": 0})
            for name in entry:
                entry[name] += counts.get(name, 0)
    return totals


def common_target(runs: Sequence[Run], target: float | None = None) -> float | None:
    """The target that all runs are held to.

    `target` if given; else the one that the first run's configuration names; else 2 % worse than the first run's best:
    0.98 best for goal max, 1.02 best for goal min (best -/+ 0.02 |best|, so that it also holds for negative values).
    None if the first run was never evaluated.
    """
    if target is not None or runs[0].target is not None:
        return target if target is not None else runs[0].target
    value = best(runs[0])
    if value is None:
        return None
    return value - SLACK * abs(value) if runs[0].goal == "max" else value + SLACK * abs(value)


def methods(runs: Sequence[Run]) -> list[Method]:
    """Group the runs of one name, one configuration and different seeds, in the order given.

    Another configuration (`FREE` values aside), or a seed that a group already has, starts another group; groups of one
    name are labeled with their folders. Raises `RunError` where there is no
    run, or where the runs do not share one metric and goal: their numbers must not stand in one table.
    """
    if not runs:
        raise RunError("a report needs at least one run folder, none was given")
    for run in runs[1:]:
        if (run.metric, run.goal) != (runs[0].metric, runs[0].goal):
            raise RunError(
                f"{run.path}: measures {run.metric!r} (goal {run.goal}), but {runs[0].path} measures "
                f"{runs[0].metric!r} (goal {runs[0].goal}); write a report for each metric"
            )
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            alike = group[0].name == run.name and _method(group[0]) == _method(run)
            if alike and run.seed not in [other.seed for other in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    names = [group[0].name for group in groups]
    labels: list[str] = []
    for group in groups:
        name, folder = group[0].name, group[0].path.resolve().name
        label = name if names.count(name) == 1 else f"{name} ({folder})"
        labels.append(label if label not in labels else f"{label} #{len(labels) + 1}")
    told = scenarios([group[0] for group in groups])
    found = [Method(label, tuple(group), data) for label, group, data in zip(labels, groups, told, strict=True)]
    places = {name: place for place, name in enumerate(dict.fromkeys(method.short for method in found))}
    return [replace(method, place=places[method.short]) for method in found]


def scenarios(runs: Sequence[Run]) -> list[str]:
    """What each run's data are, in the settings of [data] that differ between them: "alpha=0.1"; "" if none does."""
    flats = [{key: value for key, value in settings(run).items() if key.startswith("data.")} for run in runs]
    keys = [key for key in dict.fromkeys(key for flat in flats for key in flat) if key.rpartition(".")[2] != "seed"]
    differ = [key for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1]
    return [", ".join(f"{key.rpartition('.')[2]}={flat.get(key)}" for key in differ) for flat in flats]


def baselines(groups: Sequence[Method]) -> dict[str, Method]:
    """The first method of each scenario."""
    return {scenario: mine[0] for scenario, mine in by_scenario(groups).items()}


def by_scenario(groups: Sequence[Method]) -> dict[str, list[Method]]:
    """The methods of each scenario, in the order given."""
    found: dict[str, list[Method]] = {}
    for group in groups:
        found.setdefault(group.scenario, []).append(group)
    return found


def settings(run: Run) -> dict[str, Any]:
    """The run's configuration as one flat dict: "method.codec.name" -> "cast"."""

    def flat(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
        rows: list[tuple[str, Any]] = []
        for key, value in tree.items():
            rows += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        return rows

    return dict(flat(run.header.get("experiment") or {}, ""))


def _method(run: Run) -> dict[str, Any]:
    return {key: v for key, v in settings(run).items() if key not in FREE and key.rpartition(".")[2] != "seed"}


def mean_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation over seeds; no mean if a seed lacks the value, no spread for one seed."""
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None, None
    return (known[0], None) if len(known) == 1 else (statistics.fmean(known), statistics.stdev(known))


def traffic_saved(runs: Sequence[Run], baseline: Sequence[Run], target: float | None) -> Saved:
    """1 - bytes / bytes of the baseline, each a mean over seeds, until the target.

    Where one of the two did not reach the target with every seed, the bytes of the whole runs are compared instead;
    the result says which.
    """
    ours, _ = mean_spread([bytes_to(run, target) for run in runs])
    theirs, _ = mean_spread([bytes_to(run, target) for run in baseline])
    basis = "to the target"
    if ours is None or theirs is None:
        basis = "whole run"
        ours = statistics.fmean(run.bytes_up + run.bytes_down for run in runs)
        theirs = statistics.fmean(run.bytes_up + run.bytes_down for run in baseline)
    return Saved(1 - ours / theirs, basis) if theirs else Saved(None, "the baseline sent nothing")


def _ratio(method: Method, baseline: Method, target: float | None) -> tuple[float | None, str]:
    if target is None:
        return None, "no target: the baseline was never evaluated"
    for each in (baseline, method):
        reached = sum(rounds_to(run, target) is not None for run in each.runs)
        if reached < len(each.runs):
            some = f"{reached} of {len(each.runs)} seeds reached" if reached else "did not reach"
            return None, f"{each.label}: {some} the target"
    ours, _ = mean_spread([bytes_to(run, target) for run in method.runs])
    theirs, _ = mean_spread([bytes_to(run, target) for run in baseline.runs])
    if not ours or theirs is None:
        return None, f"{method.label}: sent nothing"
    return theirs / ours, ""


def summary(runs: Sequence[Run], target: float | None = None) -> list[dict[str, Any]]:
    """One row a method, in the order given; every number is a mean over its seeds, `left_out` a sum.

    Keys: name, short (without the scenario), scenario, baseline (its name), seeds, metric, goal, target, reached (seeds
    that reached it), final, best, final_error, worst_decile, rounds, rounds_to_target, bytes_up, bytes_down,
    bytes_to_target, simulated and simulated_to_target (seconds), ratio (bytes to target, baseline / ours) and ratio_reason
    (why it is None), traffic_saved and traffic_saved_basis ("to the target" or "whole run"), seconds, left_out, spread
    (key -> standard deviation over seeds). None: not reached or not measured, by one seed at least.
    Raises `RunError` as `methods` does.
    """
    groups = methods(runs)
    first, fraction = baselines(groups), is_fraction(runs)
    goals = {scenario: common_target(group.runs, target) for scenario, group in first.items()}
    measures: dict[str, Callable[[Run], float | None]] = {
        "final": final,
        "best": best,
        "final_error": final_error if fraction else final,
        "worst_decile": worst_decile,
        "rounds": lambda run: int(run.rounds[-1]["round"]),
        "rounds_to_target": lambda run: rounds_to(run, row["target"]),
        "bytes_up": lambda run: run.bytes_up,
        "bytes_down": lambda run: run.bytes_down,
        "bytes_to_target": lambda run: bytes_to(run, row["target"]),
        "simulated": lambda run: run.simulated,
        "simulated_to_target": lambda run: seconds_to(run, row["target"]),
        "seconds": lambda run: run.seconds,
    }
    rows, row = [], dict[str, Any]()
    for group in groups:
        baseline, goal = first[group.scenario], goals[group.scenario]
        row = {"name": group.label, "short": group.short, "scenario": group.scenario, "baseline": baseline.label}
        row |= {"seeds": [run.seed for run in group.runs], "spread": {}}
        row |= {"metric": runs[0].metric, "goal": runs[0].goal, "target": goal}
        row["reached"] = sum(rounds_to(run, goal) is not None for run in group.runs)
        for key, measure in measures.items():
            row[key], spread = mean_spread([measure(run) for run in group.runs])
            if spread is not None:
                row["spread"][key] = spread
        row["ratio"], row["ratio_reason"] = _ratio(group, baseline, goal)
        saved = traffic_saved(group.runs, baseline.runs, goal)
        row["traffic_saved"], row["traffic_saved_basis"] = saved.fraction, saved.basis
        row["left_out"] = sum(left_out(run) for run in group.runs)
        rows.append(row)
    return rows
