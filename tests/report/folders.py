"""Toy run folders for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVIL = "<script>window.stolen=1</script><img src=x onerror='window.stolen=1'>"
CONFIG = {
    "rounds": 4,
    "method": {"codec": {"name": "cast", "to": "float16"}, "sync": None},
    "tags": ["a", 'b"'],
    "lr": 0.1,
}


def make(
    folder: Path,
    values: Sequence[float | None],
    *,
    name: str = "fedavg",
    seed: int = 0,
    up: int = 100,
    down: int = 200,
    per_client: Sequence[float | None] = (),
    dropped: Mapping[int, str] | None = None,
    sync: Sequence[Mapping[str, Any] | None] = (),
    aggregate: Sequence[Mapping[str, Any] | None] = (),
    cohort: Sequence[int] = (0, 1),
    monitor: int = 0,
    **header: Any,
) -> Path:
    """A run folder: `values` is the metric round by round (None: not evaluated), `up` and `down` bytes a round.

    `sync` is what a dynamic rule told of each round; None or shorter: nothing, as in old records; `aggregate` likewise
    what aggregation told. `monitor`: bytes of the rule's messages in a round, part of `up`.
    """
    metric = header.pop("metric", {"name": "accuracy", "goal": "max"})
    folder.mkdir(parents=True)
    run = {
        "format": 1,
        "name": name,
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"taciturn": "0.1.0", "torch": "2.9.0", "python": "3.11.2"},
        "experiment": CONFIG,
        "seed": seed,
        "engine": {"name": "stacked", "path": "vmap", "block": 16, "why": "faster when measured"},
        "d": 12345,
        "p": 0,
        "clients": [f"client-{i:03d}" for i in range(max(3, len(per_client), len(cohort)))],
        "metric": metric,
        "target": None,
        "note": "",
    }
    (folder / "run.json").write_text(json.dumps(run | header))
    lines = []
    for at, value in enumerate(values, 1):
        last = at == len(values)
        spread = {"ids": list(range(len(per_client))), "count": [1] * len(per_client), metric["name"]: list(per_client)}
        kinds = {
            "up/update": {"payload": up - 10 - monitor, "frame": 10, "messages": 2},
            "down/model": {"payload": down - 20, "frame": 20, "messages": 2},
        }
        if monitor:
            kinds["up/monitor"] = {"payload": monitor, "frame": 0, "messages": 2}
        line = {
            "round": at,
            "loss": 2 / at,
            "seconds": 0.5 * at,
            "bytes_up": up * at,
            "bytes_down": down * at,
            "bytes_evaluate": 50 * at,
            "metrics": None if value is None else {metric["name"]: value, "other": 0.0},
            "spread": spread if per_client and last else None,
            "steps": 6,
            "cohort": list(cohort),
            "left_out": [{"client": "client-001", "why": dropped[at]}] if dropped and at in dropped else [],
            "traffic": {"up": up, "down": down, "monitor": monitor, "exchanges": 1, "by_kind": kinds},
        }
        if at <= len(sync) and sync[at - 1] is not None:
            line |= {"sync": sync[at - 1], "longest": 7 * at}
        if at <= len(aggregate) and aggregate[at - 1] is not None:
            line["aggregate"] = aggregate[at - 1]
        lines.append(json.dumps(line))
    (folder / "record.jsonl").write_text("\n".join(lines) + "\n")
    return folder
