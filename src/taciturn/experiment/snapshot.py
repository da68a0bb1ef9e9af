"""The server in a checkpoint: its state as tensors, and as JSON what is no tensor.

A log of frames is a record by version, {"12": payload}.
"""

from __future__ import annotations

from typing import Any

from taciturn.core.state import State
from taciturn.core.types import Cast, Payload
from taciturn.round import ServerState


def server_record(server: ServerState) -> tuple[State, dict[str, Any]]:
    """-> (tensors, facts)."""
    merges = {layer: {"left": x, "right": y} for layer, (x, y) in server.merges.items()}
    state: State = {name: getattr(server, name) for name in ("x", "opt", "agg", "sync")} | {"merges": merges}
    cast = server.cast
    if cast is None:
        return state, {}
    state["held"] = cast.held
    state["log"] = {str(version): frame for version, frame in cast.log}
    state["base_log"] = {str(version): frame for version, frame in cast.merges}
    return state, {"cast": {"version": cast.version, "source": cast.source}}


def server_of(state: State, facts: dict[str, Any]) -> ServerState:
    """The inverse of `server_record`; facts: also "round"."""

    def log(name: str) -> tuple[tuple[int, Payload], ...]:
        return tuple(sorted((int(version), frame) for version, frame in state.get(name, {}).items()))

    cast = None
    opt, agg, sync = (state.get(name, {}) for name in ("opt", "agg", "sync"))
    if "cast" in facts:
        version, source = facts["cast"]["version"], facts["cast"]["source"]
        cast = Cast(version, source, state["held"], log("log"), log("base_log"))
    merges = {layer: (pair["left"], pair["right"]) for layer, pair in state.get("merges", {}).items()}
    return ServerState(facts["round"], state["x"], opt, agg, sync, cast, merges)
