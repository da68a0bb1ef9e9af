"""The ClientApp of the Flower run, in a module of its own: a Ray worker imports it once and keeps data and model."""

from __future__ import annotations

import os
from functools import cache

import torch
from clock import Job
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch_parts import Steps, network

app = ClientApp()


@cache
def held() -> tuple[Job, Tensor, Tensor, nn.Module]:
    """What a worker keeps between messages: the job, all clients' tensors, one network."""
    torch.set_num_threads(1)
    file, workload, seed = os.environ["PEER_JOB"].split("|")
    asked = Job(file, workload, 0, int(seed))
    torch.manual_seed(asked.seed)
    return asked, torch.from_numpy(asked.x), torch.from_numpy(asked.y), network(workload)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One epoch on the client that the message names."""
    asked, x, y, model = held()
    client = int(message.content["config"]["client"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    steps = Steps()
    optimizer = steps.watch(torch.optim.SGD(model.parameters(), lr=asked.lr, foreach=True))
    for index in torch.randperm(asked.samples).split(asked.batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[client, index]), y[client, index]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": asked.samples, "steps": steps.count})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
