"""Flower: its FedAvg strategy through the Message API on the simulation engine (Ray), one CPU a client.

One SuperNode a client of the pool; the ClientApp keeps data and model in the worker between messages. The strategy draws
its nodes, and each message names the client whose data the node takes, so that cohorts are the same in all frameworks. The
clock stands in the strategy's own hook after a round (`evaluate_fn`); nothing is evaluated between the first and the last.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from clock import Clock, Job, job
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from flwr_client import app as client_app
from torch_parts import network, tested


def summed(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Steps of a round, over its clients."""
    return MetricRecord({"steps": sum(int(reply["metrics"]["steps"]) for reply in replies)})


class Named(FedAvg):
    """Flower's FedAvg; every message carries the number of a client of the round's cohort."""

    cohorts: list[list[int]]

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """The messages of FedAvg, each with its client."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, client in zip(messages, self.cohorts[server_round - 1], strict=True):
            message.content = RecordDict({"arrays": arrays, "config": ConfigRecord({"client": client})})
        return messages


def server(asked: Job, clock: Clock, seen: dict[str, Any]) -> ServerApp:
    """The strategy from the start weights; `seen` gets the scores and the steps."""
    app = ServerApp()

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number:
            clock.round_done()
        if number in (0, asked.rounds):
            model = network(asked.workload)
            model.load_state_dict(arrays.to_torch_state_dict())
            seen["start" if number == 0 else "end"] = tested(model, asked)
        return None

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Named(
            fraction_train=asked.cohort / asked.clients,
            fraction_evaluate=0.0,
            min_train_nodes=asked.cohort,
            min_available_nodes=asked.clients,
            train_metrics_aggr_fn=summed,
        )
        strategy.cohorts = asked.cohorts
        weights = ArrayRecord({name: torch.from_numpy(array) for name, array in asked.weights.items()})
        result = strategy.start(grid=grid, initial_arrays=weights, num_rounds=asked.rounds, evaluate_fn=evaluate)
        seen["steps"] = sum(int(record["steps"]) for record in result.train_metrics_clientapp.values())

    return app


def main() -> None:
    """One run."""
    torch.set_num_threads(1)
    asked = job()
    os.environ["PEER_JOB"] = f"{asked.file}|{asked.workload}|{asked.seed}"
    clock, seen = Clock(asked.rounds), {}
    cores = len(os.sched_getaffinity(0))
    run_simulation(
        server_app=server(asked, clock, seen),
        client_app=client_app,
        num_supernodes=asked.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "address": "local",
                "num_cpus": cores,
                "log_to_driver": False,
                "_temp_dir": str(Path.cwd() / "ray"),
            },
        },
    )
    clock.report(("flwr", "ray", "torch"), seen["steps"], seen["start"], seen["end"], workers=cores)


if __name__ == "__main__":
    main()
