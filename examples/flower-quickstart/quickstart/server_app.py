"""The server's half: a plain ServerApp of Flower."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net, accuracy, load_data

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg, evaluated on the server's test data."""
    rounds, out = int(context.run_config.get("num-server-rounds", 20)), Path(str(context.run_config.get("out", ".")))
    torch.manual_seed(0)
    arrays = ArrayRecord(Net().state_dict())
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=evaluate)
    found = {n: metrics["accuracy"] for n, metrics in result.evaluate_metrics_serverapp.items()}
    (out / "accuracy.json").write_text(json.dumps(found))


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Accuracy of the global model."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy(net, load_data(0, 2)[1])})
