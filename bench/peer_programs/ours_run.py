"""taciturn through its public interface: the stacked engine, without a run folder, evaluated after the clock."""

from __future__ import annotations

import torch
from clock import Clock, job
from torch_parts import started, tested

import taciturn
from taciturn import Experiment, Federation, Method, TableClients, Task, participation, solvers


def main() -> None:
    """One run."""
    torch.set_num_threads(1)
    asked = job()
    clock = Clock(asked.rounds)
    fields = {"input": torch.from_numpy(asked.x).flatten(0, 1), "target": torch.from_numpy(asked.y).flatten()}
    rows = torch.arange(len(fields["target"])).split(asked.samples)
    train = TableClients.of(fields, {f"c{i}": part for i, part in enumerate(rows)})
    one = {"input": torch.from_numpy(asked.test_x[:1]), "target": torch.from_numpy(asked.test_y[:1])}
    central = TableClients.of(one, {"server": torch.arange(1)})  # the last round is evaluated: inside the clock, so on one
    model = started(asked)
    method = Method(
        participation=participation.uniform(count=asked.cohort), solver=solvers.sgd(lr=asked.lr), batch_size=asked.batch
    )
    task = Task(model, Federation(train, "classification", 10, central=central))
    experiment = Experiment(
        task, method, rounds=asked.rounds, seed=asked.seed, engine="stacked", evaluate_every=asked.rounds
    )
    start = tested(model, asked)
    result = taciturn.run(experiment, callbacks=(lambda line: clock.round_done(),))
    if [line["cohort"] for line in result.history] != asked.cohorts:
        raise SystemExit("other cohorts than those of the data file")
    steps = sum(line["steps"] * len(line["cohort"]) for line in result.history)
    model.load_state_dict(result.tensors)
    engine = result.header["engine"]
    clock.report(("torch",), int(steps), start, tested(model, asked), way=f"{engine['path']}: {engine['why']}")


if __name__ == "__main__":
    main()
