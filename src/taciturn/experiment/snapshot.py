"""The server in a checkpoint: its state as tensors, and as JSON what is no tensor.

A log of frames is a record by version, {"12": payload}; further frames of one version are "12.1", "12.2".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taciturn.core.state import State
from taciturn.core.types import Cast, Payload
from taciturn.round import ServerState

Frames = tuple[tuple[int, Payload], ...]


def server_record(server: ServerState) -> tuple[State, dict[str, Any]]:
    """-> (tensors, facts)."""
    merges = {layer: {"left": x, "right": y} for layer, (x, y) in server.merges.items()}
    state: State = {name: getattr(server, name) for name in ("x", "opt", "agg", "sync", "precision")} | {"merges": merges}
    cast = server.cast
    if cast is None:
        return state, {}
    state["held"] = cast.held
    own = {str(k): one for k, one in enumerate(cast.kinds) if one is not None}
    state["kinds"] = {k: {"x": one.held["x"], "log": _log(one.log)} for k, one in own.items()}
    state["log"] = _log(cast.log)
    state["base_log"] = _log(cast.merges)
    return state, {"cast": {"version": cast.version, "source": cast.source, "kinds": len(cast.kinds)}}


def _log(frames: Frames) -> State:
    seen = [version for version, _ in frames]
    labels = (f"{version}.{seen[:i].count(version)}" for i, version in enumerate(seen))
    return {label.removesuffix(".0"): frame for label, (_, frame) in zip(labels, frames, strict=True)}


def server_of(state: State, facts: dict[str, Any]) -> ServerState:
    """The inverse of `server_record`; facts: also "round"."""

    def log(found: State) -> Frames:
        order = sorted((tuple(map(int, label.split("."))), label) for label in found)
        return tuple((place[0], found[label]) for place, label in order)

    cast = None
    opt, agg, sync, bits = (state.get(name, {}) for name in ("opt", "agg", "sync", "precision"))
    if "cast" in facts:
        version, source = facts["cast"]["version"], facts["cast"]["source"]
        cast = Cast(version, source, state["held"], log(state.get("log", {})), log(state.get("base_log", {})))
        own: list[Cast | None] = [None] * facts["cast"].get("kinds", 0)
        for k, one in state.get("kinds", {}).items():
            own[int(k)] = replace(cast, held=cast.held | {"x": one["x"]}, log=log(one.get("log", {})))
        cast = replace(cast, kinds=tuple(own))
    merges = {layer: (pair["left"], pair["right"]) for layer, pair in state.get("merges", {}).items()}
    return ServerState(facts["round"], state["x"], opt, agg, sync, cast, merges, bits)
