"""FedJAX: its federated_averaging with the default (jit) backend, clients' arrays in memory, a haiku model.

The start weights are the file's, turned into haiku's layout, so all programs start from the same function.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from clock import Clock, Job, Score, job, score

# names that jax has removed and FedJAX still uses
for name in ("tree_flatten", "tree_leaves", "tree_map", "tree_structure", "tree_unflatten"):
    setattr(jax, name, getattr(jax.tree_util, name))

import fedjax  # noqa: E402
import haiku as hk  # noqa: E402


class Count:
    """Counts the batches that FedJAX cuts: one step each."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, batch: Any) -> Any:
        """The batch as it is."""
        self.batches += 1
        return batch


def forward(workload: str) -> Any:
    """The network of the workload on images [b, ...] without channels first."""
    head = [hk.Flatten()]
    hidden = (512,) if workload == "W2" else (200, 200)
    if workload == "W2":
        head = [
            hk.Conv2D(32, 5, padding="SAME"), jax.nn.relu, hk.MaxPool(2, 2, "VALID"),
            hk.Conv2D(64, 5, padding="SAME"), jax.nn.relu, hk.MaxPool(2, 2, "VALID"), hk.Flatten(),
        ]  # fmt: skip
    layers = [part for width in hidden for part in (hk.Linear(width), jax.nn.relu)]
    return hk.Sequential([*head, *layers, hk.Linear(10)])


def model_of(asked: Job) -> fedjax.Model:
    """As FedJAX wraps haiku models."""
    shape = (1, 28, 28, 1) if asked.workload == "W2" else (1, 784)
    return fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(lambda batch: forward(asked.workload)(batch["x"])),
        sample_batch={"x": np.zeros(shape, np.float32), "y": np.zeros(1, np.int32)},
        train_loss=lambda batch, out: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], out),
        eval_metrics={"accuracy": fedjax.metrics.Accuracy()},
    )


def converted(asked: Job, like: Any) -> Any:
    """The file's weights in the shapes of `like`: [out, in, h, w] -> [h, w, in, out], channels last."""
    arrays = list(asked.weights.values())
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    params = {}
    for (module, held), (weight, bias) in zip(like.items(), pairs, strict=True):
        if weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif asked.workload == "W2" and weight.shape[1] == 64 * 7 * 7:
            weight = weight.reshape(-1, 64, 7, 7).transpose(2, 3, 1, 0).reshape(64 * 7 * 7, -1)
        else:
            weight = weight.T
        if weight.shape != held["w"].shape or bias.shape != held["b"].shape:
            raise SystemExit(f"{module}: {weight.shape} for {held['w'].shape}")
        params[module] = {"w": jax.numpy.array(weight), "b": jax.numpy.array(bias)}
    return params


def images(asked: Job, x: np.ndarray) -> np.ndarray:
    """[..., 1, 28, 28] -> [..., 28, 28, 1]."""
    return np.ascontiguousarray(np.moveaxis(x, -3, -1)) if asked.workload == "W2" else x


def main() -> None:
    """One run."""
    asked = job()
    clock, count = Clock(asked.rounds), Count()
    model = model_of(asked)
    params = converted(asked, model.init(jax.random.PRNGKey(0)))
    x, y = images(asked, asked.x), asked.y.astype(np.int32)
    clients = fedjax.InMemoryFederatedData({f"c{i}": {"x": x[i], "y": y[i]} for i in range(asked.clients)})
    clients = clients.preprocess_batch(count)
    count.batches = 0  # it looks at every client once
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(asked.lr),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=asked.batch, num_epochs=1, seed=asked.seed),
    )
    test_x = images(asked, asked.test_x)

    def tested(params: Any) -> Score:
        return score(np.asarray(model.apply_for_eval(params, {"x": test_x})), asked.test_y)

    start = tested(params)
    state = algorithm.init(params)
    for number, cohort in enumerate(asked.cohorts):
        keys = jax.random.split(jax.random.PRNGKey(number), asked.cohort)
        held = clients.get_clients([f"c{i}" for i in cohort])
        state, _ = algorithm.apply(state, [(name, client, key) for (name, client), key in zip(held, keys, strict=True)])
        jax.block_until_ready(state.params)
        clock.round_done()
    packages = ("fedjax", "jax", "jaxlib", "dm-haiku")
    clock.report(packages, count.batches, start, tested(state.params))


if __name__ == "__main__":
    main()
