"""What came out, in sentences: one about all methods, one about each against the baseline of its data, and the target.

Symbols: a row is one of `tables.summary`; `first` is the row of its baseline. Sites are clients: the word of who decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taciturn.report.read import Run
from taciturn.report.tables import baselines, methods
from taciturn.report.words import SEMICOLON, Words, count, known, listed, metric_value, passage, say, size, value_text

Row = Mapping[str, Any]
FEW = 10  # where the baseline sends as many times more, or longer, it reads "1/10" and no percentage
ALIKE = 0.005  # ratios closer to 1 than this, and points below a tenth of it times 100, are no difference


def sentences(rows: Sequence[Row], fraction: bool) -> list[tuple[str, list[Words]]]:
    """Of each scenario its name and a sentence about each method."""
    first = {row["name"]: row for row in rows}
    found: dict[str, list[Words]] = {}
    for row in rows:
        found.setdefault(row["scenario"], []).append(sentence(row, first[row["baseline"]], fraction))
    return list(found.items())


def sentence(row: Row, first: Row, fraction: bool) -> Words:
    """What a method reached, in how many rounds and bytes, and against the baseline `first`: traffic, time, worst tenth."""
    seeds, reached = len(row["seeds"]), row["reached"]
    ran = say("ran", rounds=say("rounds", n=count(row["rounds"])), size=size(row["bytes_up"] + row["bytes_down"]))
    if row["target"] is None:
        return _end(say("no_target", name=row["short"], ran=ran))
    goal = value_text(row["target"], row["metric"], fraction)
    if reached < seeds:
        key = "reached_by_some" if reached else "not_reached"
        some = say(key, name=row["short"], goal=goal, reached=reached, seeds=seeds, ran=ran)
        top = None if row["best"] is None else metric_value(row["best"], fraction)
        return _end(some, say("never_evaluated") if top is None else say("its_best", best=top), worst(row, first, fraction))
    rounds, mean = say("rounds", n=count(row["rounds_to_target"])), say("mean_of", n=seeds) if seeds > 1 else None
    found = say("reached", name=row["short"], goal=goal, rounds=rounds, size=size(row["bytes_to_target"]), mean=mean or "")
    return _end(found, traffic(row, first), time(row, first), worst(row, first, fraction))


def _end(*clauses: Words | None) -> Words:
    told = [clause for clause in clauses if clause is not None]
    stop = say("stop")
    return Words("".join(each.en for each in told) + stop.en, "".join(each.ja for each in told) + stop.ja)


def traffic(row: Row, first: Row) -> Words | None:
    """Bytes to the target against the baseline's: "1/212 of the traffic of X", "43 % less than X", "as much as X"."""
    if row is first:
        return None
    if row["ratio"] is None:
        return say("baseline_did_not", first=first["short"]) if first["reached"] < len(first["seeds"]) else None
    less = row["ratio"]
    if less >= FEW:
        return say("traffic_part", first=first["short"], part=f"1/{less:.0f}")
    if abs(1 - 1 / less) < ALIKE:
        return say("traffic_alike", first=first["short"])
    if less < 0.5:
        return say("traffic_times", first=first["short"], times=f"{1 / less:.3g}")
    return say(
        "traffic_less" if less > 1 else "traffic_more", first=first["short"], percent=f"{abs(100 - 100 / less):.0f}\u00a0%"
    )


def time(row: Row, first: Row) -> Words | None:
    """Simulated time to the target against the baseline's; None where one of the two has none."""
    ours, theirs = row["simulated_to_target"], first["simulated_to_target"]
    if row is first or not ours or not theirs:
        return None
    if abs(ours / theirs - 1) < ALIKE:
        return say("time_alike")
    if theirs / ours >= FEW:
        return say("time_part", part=f"1/{theirs / ours:.0f}")
    return say("time_times" if ours > theirs else "time_ratio", ratio=f"{ours / theirs:.2g}")


def worst(row: Row, first: Row, fraction: bool) -> Words | None:
    """What the worst tenth of sites loses or gains against the baseline, in the last per-client evaluation."""
    ours, theirs = row["worst_decile"], first["worst_decile"]
    if row is first or ours is None or theirs is None:
        return None
    gain = (ours - theirs) * (1 if row["goal"] == "max" else -1)
    if abs(gain) < (ALIKE / 10 if fraction else ALIKE * abs(theirs)):
        return say("worst_alike")
    shown = f"{100 * abs(gain):.1f}" if fraction else f"{abs(gain):.3g}"
    amount = say("points", n=shown) if fraction else say("amount", n=shown, metric=known("metric", row["metric"]))
    spreads = [each["spread"].get("worst_decile", 0.0) for each in (row, first)]
    noise = say("within_seeds") if abs(gain) <= max(spreads) else ""
    return say("worst_gains" if gain > 0 else "worst_loses", amount=amount, noise=noise)


def lead(rows: Sequence[Row], fraction: bool) -> Words | None:
    """The sentence on top: who says least among those that reach the target, or that the baseline is enough.

    With several scenarios, who it is in each of them. None where there is nothing to compare.
    """
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    tables = [[row for row in rows if row["scenario"] == scenario] for scenario in scenarios]
    tables = [table for table in tables if len(table) > 1 and table[0]["target"] is not None]
    if not tables:
        return None
    found = [_least(table) for table in tables]
    if len(tables) == 1:
        return _lead(found[0], tables[0][0], fraction)
    names = {None if row is None else row["short"] for row in found}
    if names == {None}:
        return _end(say("lead_nobody", goal=say("the_target")))
    if len(names) == 1 and found[0] is not None:
        if found[0] is tables[0][0]:
            return _end(say("lead_baseline_everywhere", name=found[0]["short"]))
        ratios = [row["ratio"] for row in found if row is not None and row["ratio"] is not None]
        span = say("times_fewer", low=f"{min(ratios):.3g}", high=f"{max(ratios):.3g}") if ratios else ""
        return _end(say("lead_everywhere", name=found[0]["short"], n=len(tables), span=span))
    each = [
        say("lead_where", name=say("lead_none") if row is None else row["short"], scenario=table[0]["scenario"])
        for row, table in zip(found, tables, strict=True)
    ]
    return _end(say("lead_depends", each=listed(each, SEMICOLON)))


def _least(table: Sequence[Row]) -> Row | None:
    """Who reaches the target with every seed and the fewest bytes; the baseline unless another saves more than `ALIKE`."""
    there = [row for row in table if row["bytes_to_target"] is not None]
    if not there:
        return None
    least = min(there, key=lambda row: float(row["bytes_to_target"]))
    first = table[0]["bytes_to_target"]
    return table[0] if first is not None and least["bytes_to_target"] >= (1 - ALIKE) * first else least


def _lead(row: Row | None, first: Row, fraction: bool) -> Words:
    goal = value_text(first["target"], first["metric"], fraction)
    if row is None:
        return _end(say("lead_nobody", goal=goal))
    if row is first:
        return _end(say("lead_baseline", name=first["short"], goal=goal))
    found = say("lead_least", name=row["short"], goal=goal, size=size(row["bytes_to_target"]))
    return _end(found, traffic(row, first), time(row, first), worst(row, first, fraction))


# The target ----------------------------------------------------------------------------------------------------------


def target_words(rows: Sequence[Row], runs: Sequence[Run], given: float | None, fraction: bool) -> Words:
    """The target, or that of each scenario, and where it is from; or that there is none."""
    found = {row["scenario"]: row["target"] for row in rows if row["target"] is not None}
    if not found:
        return say("target_none")
    metric = rows[0]["metric"]
    goals = [say("target_where", goal=value_text(goal, metric, fraction), scenario=name) for name, goal in found.items()]
    same = len(set(found.values())) == 1
    goal = value_text(next(iter(found.values())), metric, fraction) if same else listed(goals, SEMICOLON)
    return passage(say("target", goal=goal, source=_source(runs, given)), say("target_note"))


def _source(runs: Sequence[Run], given: float | None) -> Words:
    if given is not None:
        return say("target_given")
    if runs[0].target is not None:
        return say("target_named", name=runs[0].name)
    firsts = dict.fromkeys((group.runs[0].name, group.runs[0].seed) for group in baselines(methods(runs)).values())
    return say("target_slack", runs=listed([say("run_and_seed", name=name, seed=seed) for name, seed in firsts], SEMICOLON))


def described(rows: Sequence[Row]) -> Words:
    """The title: the methods, and the scenarios where there are several."""
    names = list(dict.fromkeys(row["short"] for row in rows))
    shown = listed(names) if len(names) <= 4 else say("and_more", names=listed(names[:3]), n=len(names) - 3)
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    return say("title_where", names=shown, scenarios=listed(scenarios, SEMICOLON)) if len(scenarios) > 1 else shown
