"""FDA around any strategy and any train function of Flower: a round ends when the models have drifted apart.

One call of the user's train function is a block. The mod calls it again and again, each time with the arrays of its last
reply in place of the message's; after each call u = y - x is looked at. The rule, thresholds and monitors are those of
`taciturn.sync`, with one step for a block and one block for an epoch.

monitor "local": each client stops itself when |u|^2 > Theta; a round is one exchange, as it was. "naive": the server looks;
each look is an exchange without arrays, and one more collects the replies. What a message says stands in the record
"taciturn.fda": monitor, blocks (until the next look, or the most), theta, rho; ask, one of "train", "go on", "collect".
Symbols: x, y, u [d] the float arrays; M clients; n blocks done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taciturn.core.errors import ConfigError, require
from taciturn.core.state import State
from taciturn.core.types import LOST, OK, Change, Observations, Plan, Spent
from taciturn.flower.between import (
    Arrays,
    Between,
    Messages,
    Send,
    app,
    arrays_of,
    change,
    layout_of,
    the_arrays,
    trains,
    weight_of,
    weights_key,
    with_records,
    without,
)
from taciturn.flower.compress import TOLD as COMPRESS
from taciturn.sync import fda

TOLD = "taciturn.fda"
HELD = "taciturn.fda/"  # records in the Context between two looks: the last reply's, and what it began from
START = "taciturn.fda-start"
LOG = logging.getLogger("flwr")


# ------------------------------------------------------------------------------------------------------- the client


def fda_mod() -> Callable[[Any, Any, Any], Any]:
    """A mod for `ClientApp(mods=[..])`, behind compress_mod: blocks until the rule of the server's `FdaOpt` says stop.

    The train function is called once a block, with the message's own configs; the reply is that of the last block. What it
    makes anew at every call, such as an optimizer's momentum, begins anew in every block. Evaluations are not touched.
    Errors, as error replies: `ConfigError` if the strategy is not wrapped, or the mods stand in the wrong order.
    """

    def mod(message: Any, context: Any, call_next: Any) -> Any:
        if not trains(message):
            return call_next(message, context)
        if COMPRESS in message.content:
            raise ConfigError(
                "fda_mod stands before compress_mod, which would encode every block: mods=[compress_mod, fda_mod]"
            )
        told = message.content.config_records.get(TOLD)
        if told is None:
            raise ConfigError("fda_mod: the server's strategy is not wrapped: FdaOpt(strategy), or no fda_mod here")
        message.content = without(message.content, TOLD)
        if str(told["ask"]) == "collect":
            return _collected(message, context)
        if str(told["ask"]) == "go on":
            name = str(told["name"])
            require(HELD + name in context.state and START in context.state, _LOST)
            message.content = with_records(message.content, **{name: context.state[HELD + name]})
        else:
            context.state[START] = the_arrays(message.content, "fda_mod: a message of the server")[1]
        reply, said = _blocks(message, context, call_next, told)
        if not reply.has_content():
            return reply
        if str(told["monitor"]) == "local":
            context.state.pop(START, None)
            reply.content = with_records(reply.content, **{TOLD: said})
            return reply
        for name, record in reply.content.items():
            context.state[HELD + name] = record
        reply.content = app().RecordDict({TOLD: said})
        return reply

    return mod


def _blocks(message: Any, context: Any, call_next: Any, told: Any) -> tuple[Any, Any]:
    """Calls until the next look, or until the client stops itself -> the last reply, and what is said of it."""
    rule = fda(monitor=str(told["monitor"]))  # type: ignore[arg-type]
    signal = {name: torch.tensor(float(told[name])) for name in ("theta", "rho")}
    name, _ = the_arrays(message.content, "fda_mod: a message of the server")
    x, most, began, done, go = arrays_of(context.state[START]), int(told["blocks"]), time.monotonic(), 0, True
    while True:
        reply = call_next(message, context)
        if not reply.has_content():
            return reply, None
        done += 1
        record = the_arrays(reply.content, "fda_mod: the train function's reply")[1]
        payload, more = rule.observe(_drift(arrays_of(record), x), {}, signal)
        go = bool(more)
        if done >= most or not go:
            seconds = (time.monotonic() - began) / done
            return reply, app().ConfigRecord({"norm": float(payload["norm"]), "blocks": done, "seconds": seconds})
        message.content = with_records(message.content, **{name: record})


def _drift(y: Arrays, x: Arrays) -> Tensor:
    """u [d] over the float arrays."""
    names = [name for name, one in y.items() if np.issubdtype(one.dtype, np.floating) and name in x]
    return change(y, x, layout_of(y, names))


def _collected(message: Any, context: Any) -> Any:
    """The last reply, which was held back."""
    held = {name: record for name, record in context.state.items() if name.startswith(HELD)}
    require(bool(held), _LOST)
    for name in [*held, START]:
        context.state.pop(name, None)
    content = app().RecordDict({name.removeprefix(HELD): record for name, record in held.items()})
    return app().Message(content, reply_to=message)


# ------------------------------------------------------------------------------------------------------- the server


@dataclass
class FdaOpt:
    """Around a strategy: its rounds end by drift. FdaOpt(FedAdam()), FdaOpt(FedAvg()), ..; clients have `fda_mod()`.

    rule: `taciturn.sync.fda(..)` with any theta, price and max_blocks; the monitor is "local", where each client tests its
    own drift and nothing is said before the upload, or "naive", where the server looks, an exchange each time: on stock
    nodes that takes seconds. `told` has, of each round, blocks, variance, drift of each client and the next threshold.
    Errors: `ConfigError`. Source: FDA-Opt, arXiv 2505.04535; docs/fda.md.
    """

    strategy: Any
    rule: fda = field(default_factory=lambda: fda(monitor="local"))
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            self.rule.monitor in ("local", "naive") and self.rule.block == 1.0,
            'FdaOpt.rule: monitor = "local" or "naive", and block = 1 (a call of the train function); got monitor = '
            f'"{self.rule.monitor}", block = {self.rule.block}',
        )

    def start(self, grid: Any, initial_arrays: Any, *more: Any, **told: Any) -> Any:
        """The strategy's `start` -> its result."""
        self.told.clear()
        arrays = arrays_of(initial_arrays)
        d = sum(one.size for one in arrays.values() if np.issubdtype(one.dtype, np.floating))
        server = _Server(self.rule, weights_key(self.strategy), self.rule.init(torch.zeros(d)), self.told)
        between = Between(grid, server.exchange)
        server.crossed = between.crossed
        return self.strategy.start(between, initial_arrays, *more, **told)


@dataclass
class _Server:
    rule: fda
    weights_key: str
    state: State
    told: list[dict[str, Any]]
    round: int = 0
    crossed: list[int] = field(default_factory=lambda: [0, 0])  # bytes up and down so far, nearest to the wire
    before: tuple[int, int] = (0, 0)  # the same, before this round
    exchanges: int = 0  # of this round

    def exchange(self, messages: Messages, send: Send) -> Messages:
        """A round of training, in one exchange or several; evaluations as they are."""
        if not messages or not all(trains(message) for message in messages):
            return send(messages)
        self.before, self.exchanges = (self.crossed[0], self.crossed[1]), 1
        m = len(messages)
        epoch = torch.ones(m, dtype=torch.int64)
        limit, stride = self.rule.schedule(epoch, self.state)
        plan = Plan(self.round, torch.arange(m), epoch, limit, torch.ones(m))
        if self.rule.observer == "client":
            signal = {name: float(value) for name, value in self.rule.signal(self.state).items()}
            replies = send([self._asked(one, "train", int(limit[0]), signal) for one in messages])
        else:
            replies = self._looked(messages, plan, stride, send)
        self._learn(messages, replies, plan)
        return replies

    def _asked(self, message: Any, ask: str, blocks: int, signal: dict[str, float] | None = None, name: str = "") -> Any:
        nothing = {"theta": float("inf"), "rho": float("nan")}
        told = {"ask": ask, "monitor": self.rule.monitor, "blocks": blocks} | (signal or nothing)
        told |= {"name": name} if name else {}
        message.content = with_records(message.content, **{TOLD: app().ConfigRecord(told)})
        return message

    def _looked(self, messages: Messages, plan: Plan, stride: Tensor, send: Send) -> Messages:
        """The server looks after each stride; then the replies are collected."""
        names = [the_arrays(message.content, "FdaOpt: a message of the strategy")[0] for message in messages]
        place = {message.metadata.dst_node_id: i for i, message in enumerate(messages)}
        bare = [without(message.content, name) for message, name in zip(messages, names, strict=True)]
        done, heard = torch.zeros(len(messages), dtype=torch.int64), torch.ones(len(messages), dtype=torch.bool)
        more: Tensor | None = stride
        asked = [self._asked(message, "train", int(stride[i])) for i, message in enumerate(messages)]
        failed: Messages = []
        while True:
            norm, before = torch.zeros(len(messages), dtype=torch.float64), heard.clone()
            heard[:] = False
            for reply in send(asked):
                i = place[reply.metadata.src_node_id]
                if reply.has_error():
                    failed.append(reply)
                    continue
                said = _said(reply)
                norm[i], heard[i] = float(said["norm"]), True
                done[i] += int(said["blocks"])
            heard &= before
            if not heard.any():
                return failed
            live = heard & (done < plan.limit)
            seen = Observations({"norm": norm}, heard, live, done, self._spent(len(messages)))
            more, self.state = self.rule.watch(seen, plan, self.state)
            last = more is None or not live.any()
            asked = [
                self._asked(self._again(messages[i], bare[i]), "collect", 1)
                if last
                else self._asked(self._again(messages[i], bare[i]), "go on", int(more[i]), name=names[i])  # type: ignore[index]
                for i in heard.nonzero().flatten().tolist()
            ]
            self.exchanges += 1
            if last:
                return [*send(asked), *failed]

    @staticmethod
    def _again(message: Any, content: Any) -> Any:
        """Another message to the same node, without arrays."""
        told = message.metadata
        return app().Message(content, dst_node_id=told.dst_node_id, message_type=told.message_type, group_id=told.group_id)

    def _spent(self, m: int) -> Spent:
        up, down = (now - before for now, before in zip(self.crossed, self.before, strict=True))
        return Spent(up / m, down / m, self.exchanges)

    def _learn(self, messages: Messages, replies: Messages, plan: Plan) -> None:
        """The next threshold; what the clients said is taken out of the replies."""
        m, place = len(messages), {message.metadata.dst_node_id: i for i, message in enumerate(messages)}
        zeros = torch.zeros(m, dtype=torch.float64)
        stats = {"norm": zeros.clone(), "steps": zeros.clone(), "status": torch.full((m,), LOST)}
        weights, seconds = zeros.clone(), 0.0
        for reply in replies:
            if reply.has_error():
                continue
            i = place[reply.metadata.src_node_id]
            stats["status"][i], weights[i] = OK, weight_of(reply, self.weights_key)
            if self.rule.observer == "client":
                said = _said(reply)
                stats["norm"][i], stats["steps"][i] = float(said["norm"]), int(said["blocks"])
                seconds = max(seconds, float(said["seconds"]))
                reply.content = without(reply.content, TOLD)
        if not weights.any():
            return
        plan = Plan(plan.round, plan.ids, plan.epoch_steps, plan.limit, weights)
        spent = self._spent(m)
        spent = Spent(spent.up, spent.down, spent.exchanges, seconds)
        self.state = self.rule.update(self.state, plan, stats, spent, Change(torch.zeros(0)))
        self.round += 1
        self.told.append(self.rule.tell(self.state))
        LOG.info("taciturn: %.1f blocks, next threshold %s", self.told[-1]["blocks"], self.told[-1]["next"]["theta"])


_LOST = "fda_mod: this node has lost its state in mid-round, and holds nothing to go on with"


def _said(reply: Any) -> Any:
    """What a client says of its drift. Errors: `ConfigError`."""
    if TOLD not in reply.content:
        raise ConfigError(
            f"FdaOpt: node {reply.metadata.src_node_id} says nothing of its drift, so its ClientApp lacks the mod: "
            "ClientApp(mods=[fda_mod()])"
        )
    return reply.content[TOLD]
