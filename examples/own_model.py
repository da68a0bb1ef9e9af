"""A model, a loss and clients of your own, in ten lines.

Run: python examples/own_model.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import taciturn
from taciturn import Experiment, Method, Task, participation, solvers

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
clients = [TensorDataset(x[i:1400:20], y[i:1400:20]) for i in range(20)]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
task = Task(model, clients, loss=nn.CrossEntropyLoss(), test=TensorDataset(x[1400:], y[1400:]))
method = Method(participation=participation.uniform(count=5), solver=solvers.sgd(lr=0.1), batch_size=10)
result = taciturn.run(Experiment(task, method, rounds=20))
up, down = result.bytes_up / 1e6, result.bytes_down / 1e6
print(f"accuracy {result.metrics['accuracy']:.3f}, {up:.2f} MB up, {down:.2f} MB down")
