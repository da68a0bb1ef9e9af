"""The client's half: a plain ClientApp of Flower."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """An epoch on this owner's data."""
    partition = int(context.node_config["partition-id"])
    data, _ = load_data(partition, int(context.node_config["num-partitions"]))
    torch.set_num_threads(1)
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(net, data, seed=1000 * int(message.content["config"]["server-round"]) + partition)
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(data)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
