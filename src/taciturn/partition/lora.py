"""Low-rank adapters: W = W0 + (alpha / r) B A, W0 frozen, B and A shared. The one door to peft.

Symbols: W0 [m, n] a frozen weight; B [m, r] starts at 0, A [r, n] at random; r the rank. A convolution's A is [r, n, k, k]
and its B [m, r, 1, 1]; an embedding of n words of width m has A [r, n], B [m, r].
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from taciturn.core.errors import ConfigError, MethodError, ModelError, require, unknown
from taciturn.core.rounding import applies, levels, quantized
from taciturn.core.state import State, write_atomic
from taciturn.core.types import Record, Split
from taciturn.core.vector import Kind, Layout, Part
from taciturn.partition.by_name import below, cut, expand, refuse_tracked

KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTER = "default"  # peft's name for the only one there is
FACTOR = {side: re.compile(rf"lora_(embedding_)?{side}\b") for side in "AB"}
CORE = re.compile(rf"lora_(embedding_)?B(\.{ADAPTER})?(\.weight)?$")
BESIDE = "base_model.model."  # what peft writes before every name of a saved adapter


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("partition lora needs peft: pip install 'taciturn[lora]'") from error
    return peft


def called(name: str) -> str:
    """A parameter's name in peft's state dict, which leaves out the adapter's.

    >>> called("stem.lora_A.default.weight"), called("table.lora_embedding_A.default"), called("head.bias")
    ('stem.lora_A.weight', 'table.lora_embedding_A', 'head.bias')
    """
    return re.sub(rf"(lora_\w+)\.{ADAPTER}(?=\.|$)", r"\1", name)


@dataclass(frozen=True, slots=True)
class lora:
    """Adapters of rank r in the target layers are shared, and what `also` names; all else is frozen, the same for all.

    A forward pass computes W0 x + (alpha / r) B (A x). targets: names of modules, patterns with * and ?, or "linear": every
    linear layer but the head. Linear, embedding and convolution layers can have adapters. also: names, patterns or helpers
    ("head", "norms") of parameters that are trained and shared beside them; personal: likewise, trained and kept on the
    client. The adapters are peft's, put in by `peft.inject_adapter_in_model` and exchanged under the names of its state
    dict.
    ranks: of the clients, where they differ: client i has rank ranks[i mod their number], the largest being `rank`; it
    holds, trains and sends the first r_i columns of B and rows of A. alpha / r, of the largest, is the same for all.
    share: what is trained and sent. "both"; "A" or "B"; "alternate": B in even rounds and A in odd ones, and what changed
    comes down (RoLoRA, whose usual form this is); "core": W0 + (alpha / r) B R A with B and A fixed, orthonormal and drawn
    at the start, and R [r, r] from 0 (Fed-SB). rest, with "A" or "B": the other factor is "frozen", at its start, the same
    for all; "personal": trained, and stays on the client; "server": the server's, which sends it (low_rank fedsvd). share
    "B", rest "frozen" is FFA-LoRA; share "A", rest "personal" FedSA-LoRA.
    base_bits: 8 or 4: W0 is Q(W0) (core/rounding.py) where it has 16 features on both sides, so that adapters are trained
    on what is deployed, as in QLoRA; adapters, `also` and `personal` stay float. 0: W0 as it is given.
    Departure: Fed-SB starts from an SVD of the first gradient; here B and A are random.
    Errors: `ModelError` for targets that cannot have one; `UnknownName`; `ConfigError` without peft.
    With base_bits, QLoRA has blocks of NF4 and double quantization; here one symmetric scale a channel. In a simulation
    the weights are dequantized once, in `prepare`: they are few bits in an exported file, not in its memory.
    Source: Hu et al. 2021 (arXiv 2106.09685); Dettmers et al. 2023 (arXiv 2305.14314).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = "linear"
    also: tuple[str, ...] | str = ()
    dropout: float = 0.0
    share: Literal["both", "A", "B", "alternate", "core"] = "both"
    rest: Literal["frozen", "personal", "server"] = "frozen"
    ranks: tuple[int, ...] = ()
    personal: tuple[str, ...] | str = ()
    base_bits: Literal[0, 4, 8] = 0

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank: at least 1; got {self.rank}")
        require(self.alpha > 0, f"lora.alpha: above 0; got {self.alpha}")
        require(0 <= self.dropout < 1, f"lora.dropout: at least 0, below 1; got {self.dropout}")
        if self.share not in (shares := ("A", "B", "alternate", "both", "core")):
            raise unknown("share", self.share, shares, "lora.share")
        if self.rest not in (rests := ("frozen", "personal", "server")):
            raise unknown("rest", self.rest, rests, "lora.rest")
        alone = self.rest == "frozen" or self.share in ("A", "B")
        require(alone, f'lora.rest: {self.rest} is of the factor beside share = "A" or "B"; got share = {self.share!r}')
        wrong = self.ranks and (min(self.ranks) < 1 or max(self.ranks) != self.rank)
        require(not wrong, f"lora.ranks: at least 1, the largest being rank = {self.rank}; got {self.ranks}")
        require(self.share == "both" or not self.ranks, f'lora.ranks: with share = "both"; got {self.share!r}')
        require(self.base_bits in (0, 4, 8), f"lora.base_bits: 8, 4, or 0 for the base as it is; got {self.base_bits}")
        require(self.share != "core" or not self.personal, 'lora.personal: with share = "core" only R is trained')
        if self.share == "A" and self.rest != "personal":
            raise MethodError(
                'lora: B starts at 0, so with B frozen nothing is ever learnt; share = "B", or rest = "personal"'
            )

    @property
    def scale(self) -> float:
        """alpha / r, which every product B A is multiplied by."""
        return self.alpha / self.rank

    def adapted(self, model: nn.Module) -> list[str]:
        """Names of the modules that get an adapter, in the order of the model."""
        modules = dict(model.named_modules())
        if self.targets == "linear":
            names = {name for name, module in modules.items() if isinstance(module, nn.Linear)} - _head(model)
            if not names:
                raise ModelError("lora: the model has no linear layer but its head; name the layers, targets = (..)")
        else:
            names = set[str]()
            for word in _listed(self.targets):
                found = expand(model, (word,))
                if "*" in word or "?" in word:
                    found = {name for name in found if isinstance(modules.get(name), KINDS)}
                names |= found
        bad = sorted(name for name in names if not isinstance(modules.get(name), KINDS))
        if bad or not names:
            kinds = ", ".join(f"{name} ({type(modules[name]).__name__})" if name in modules else name for name in bad)
            raise ModelError(
                f"lora: {kinds or self.targets} cannot have an adapter; linear, embedding and convolution layers can, "
                'named as modules, for example targets = ("encoder.0",)'
            )
        return [name for name in modules if name in names]

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with its adapters; everything but them and `also` is frozen."""
        peft = _peft()
        names = self.adapted(model)
        beside, own = (expand(model, _listed(words)) for words in (self.also, self.personal))
        overlap = sorted((beside | own) & set(names))
        if overlap:
            raise MethodError(f"lora: {', '.join(overlap)} would have an adapter and be trained whole; choose one")
        if beside & own:
            raise MethodError(f"lora: {', '.join(sorted(beside & own))} cannot be shared (also) and personal; choose one")
        also = {name for name, _ in model.named_parameters() if below(name, beside | own)}
        self._lower(model, names, also)
        pattern = "|".join(re.escape(name) for name in names)
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=f"({pattern})", bias="none"
        )
        made: nn.Module = peft.inject_adapter_in_model(config, model)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(
                name in also
                or ("lora_" in name and self.share != "core" and not (self._apart(name) and self.rest == "frozen"))
            )
            if "lora_" in name and self.share == "core":
                nn.init.orthogonal_(parameter)
            elif "lora_embedding_" in name and self.share == "B":  # peft starts a table's A at 0, so B would never move
                (nn.init.normal_ if FACTOR["A"].search(name) else nn.init.zeros_)(parameter)
        return made

    def _lower(self, model: nn.Module, names: list[str], also: set[str]) -> None:
        """W <- Q(W) in these layers. Errors: `MethodError` where one is tied to a weight that is trained whole."""
        trained = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in also}
        for name in names if self.base_bits else []:
            weight = model.get_parameter(f"{name}.weight")
            if id(weight) in trained:
                raise MethodError(
                    f"lora: base_bits = {self.base_bits} would hold {name}.weight in few bits, and it is tied to "
                    f"{trained[id(weight)]}, which is trained whole; leave one of them out, or base_bits = 0"
                )
            with torch.no_grad():
                weight.copy_(self.held(weight))

    def held(self, weight: Tensor) -> Tensor:
        """W0 [m, n, ..] of a target layer as clients hold it: Q(W0) with base_bits where it applies, else as it is."""
        low = self.base_bits and applies(weight.shape)
        return quantized(weight, torch.tensor(levels(self.base_bits), device=weight.device)) if low else weight

    def _apart(self, name: str) -> bool:
        """True for the factor that is not shared."""
        other = {"A": "B", "B": "A"}.get(self.share)
        return other is not None and FACTOR[other].search(name) is not None

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """Adapters, or one factor of each, and `also` are shared; where both are, the base may take products."""
        refuse_tracked(tracked, lambda name: False)
        if self.share == "core":
            return _cores(model, self.rank)
        own = expand(model, _listed(self.personal))
        split = cut(
            model, tracked, lambda name: (self._apart(name) and self.rest == "personal") or below(name, own), called
        )
        if self.share == "alternate":
            return replace(split, kinds=(_without(split, "A"), _without(split, "B")), kind_of=_parity)
        if self.rest == "server":
            return replace(split, kinds=(_without(split, "A"),), kind_of=lambda round, ids: torch.zeros_like(ids))
        if self.share != "both":
            return split
        if self.ranks:
            split = _kinds(split, self.ranks)
        return replace(split, merging=_merging(split, _bases(model), self.scale))

    def save(self, tensors: Mapping[str, Tensor], model: nn.Module, folder: str | Path) -> Path:
        """The adapters of a trained model (`Result.tensors`) as a folder for `PeftModel.from_pretrained(model, folder)`.

        model: as it was given, without adapters; with base_bits they belong on it with `held(W0)` for W0. What `also`
        shares is not an adapter and is not written. Where W0 took products, the adapter is as wide as the rank of all that
        was learnt: then it and `model` are the trained layer.
        """
        names, folder = self.adapted(model), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {called(name): t.detach().cpu().contiguous() for name, t in tensors.items() if "lora_" in name}
        wide = {name: self._widened(name, tensors, kept, model) for name in names}
        ranks = {name: rank for name, rank in wide.items() if rank}
        config = {
            "peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "bias": "none",
            "target_modules": f"({'|'.join(re.escape(name) for name in names)})", "inference_mode": True,
            "rank_pattern": ranks, "alpha_pattern": ranks,
        }  # fmt: skip
        write_atomic(folder / "adapter_config.json", [json.dumps(config, indent=1).encode()])
        write_atomic(folder / "adapter_model.safetensors", [save({BESIDE + name: t for name, t in kept.items()})])
        return folder

    def _widened(self, layer: str, tensors: Mapping[str, Tensor], kept: dict[str, Tensor], model: nn.Module) -> int:
        """Put W - W0 into the adapter of a layer whose base has moved -> its rank, with alpha = rank; 0 if it has not."""
        now = tensors[f"{layer}.base_layer.weight"].cpu()
        given = self.held(model.get_parameter(f"{layer}.weight").detach().to(now))
        if torch.equal(now, given):
            return 0
        table = f"{layer}.lora_embedding_A" in kept
        left, right = (f"{layer}.lora_{'embedding_' if table else ''}{side}{'' if table else '.weight'}" for side in "BA")
        b, a = kept[left], kept[right]
        moved = (now.double() - given.double()).mT if table else (now.double() - given.double()).flatten(1)
        moved = moved + self.scale * b.flatten(1).double() @ a.flatten(1).double()
        u, s, v = torch.linalg.svd(moved, full_matrices=False)
        rank = max(1, int((s > s[0] * len(s) * torch.finfo(now.dtype).eps).sum()))
        half = s[:rank].sqrt()
        kept[left] = (u[:, :rank] * half).reshape(len(b), rank, *b.shape[2:]).to(b).contiguous()
        kept[right] = (half.unsqueeze(1) * v[:rank]).reshape(rank, *a.shape[1:]).to(a).contiguous()
        return rank


def _bases(model: nn.Module) -> dict[str, Tensor]:
    """Layer -> its frozen weight W0, of those whose product B A is one matrix (a grouped convolution's is several)."""
    found = {name: module.base_layer for name, module in model.named_modules() if hasattr(module, "base_layer")}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    alone = {name: base for name, base in found.items() if uses[id(base.weight)] == 1}
    return {name: base.weight.detach() for name, base in alone.items() if getattr(base, "groups", 1) == 1}


def _without(split: Split, side: str) -> Kind:
    """Clients that hold all and train all but one factor."""
    layout = split.layout
    shapes = {name: shape for name, shape in zip(layout.names, layout.shapes, strict=True) if not FACTOR[side].search(name)}
    mask = {name: torch.full(shape, name in shapes) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    own = Layout(tuple(shapes), tuple(shapes.values()))
    return Kind(trains=Part(own, layout.flatten(mask, torch.bool).to(split.x0.device)))


def _parity(round: int, ids: Tensor) -> Tensor:
    """All are of kind 0 in even rounds, and of kind 1 in odd ones."""
    return torch.full_like(ids, round % 2)


def _cores(model: nn.Module, rank: int) -> Split:
    """R [r, r] of each adapter, at 0, and what is trained beside; B R takes the place of B."""
    named = dict(model.named_parameters())
    lefts = {CORE.sub("lora_core", name): name for name in named if FACTOR["B"].search(name)}
    fixed = {core: named[name].detach() for core, name in lefts.items()}
    zeros = {core: b.new_zeros(rank, rank) for core, b in fixed.items()}
    shared = zeros | {name: p.detach() for name, p in named.items() if p.requires_grad}
    layout, empty = Layout.of(shared), Layout((), ())

    def join(held: State, y: Record, v: Record) -> Record:
        done = {lefts[core]: (b.flatten(1) @ y[core]).reshape(b.shape) for core, b in fixed.items()}
        return done | {name: t for name, t in y.items() if name not in fixed}

    first = next(iter(fixed.values()))
    none = first.new_zeros(0)
    return Split(layout, empty, empty, layout.flatten(shared, first.dtype).to(first.device), none, none, join)


def _kinds(split: Split, ranks: tuple[int, ...]) -> Split:
    """The split with a kind of client for each rank."""
    layout, known = split.layout, sorted(set(ranks))
    which = torch.tensor([known.index(rank) for rank in ranks])

    def part(rank: int) -> Part:
        mask, shapes = {}, {}
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            axis = 0 if FACTOR["A"].search(name) else 1 if FACTOR["B"].search(name) else None
            mask[name] = torch.ones(shape, dtype=torch.bool)
            if axis is not None:
                mask[name].narrow(axis, rank, shape[axis] - rank).fill_(False)
            shapes[name] = tuple(rank if place == axis else size for place, size in enumerate(shape))
        own = Layout(tuple(shapes), tuple(shapes.values()))
        return Part(own, layout.flatten(mask, torch.bool).to(split.x0.device))

    parts = [part(rank) if rank < known[-1] else None for rank in known]
    kinds = tuple(Kind(one, one) for one in parts)
    return replace(split, kinds=kinds, kind_of=lambda round, ids: which[ids % len(which)])


def _merging(split: Split, weights: dict[str, Tensor], scale: float) -> Split:
    """The split with W0 + scale x (the sum of the products that were merged) in place of W0."""
    tables = {layer for layer in weights if f"{layer}.lora_embedding_A" in split.layout.names}

    def join(held: State, y: Record, v: Record) -> Record:
        named = split.join(held, y, v)
        for layer, total in held.get("base", {}).items():
            weight = weights[layer]
            named[f"{layer}.base_layer.weight"] = weight + scale * as_weight(total, weight, layer in tables)
        return named

    shapes = {name: w.mT.shape if name in tables else w.flatten(1).shape for name, w in weights.items()}
    return replace(split, join=join, base=Layout(tuple(shapes), tuple(tuple(shape) for shape in shapes.values())))


def as_weight(product: Tensor, weight: Tensor, table: bool) -> Tensor:
    """A product [m, n] of factors in the shape of a weight: of a table (embedding) turned, of a convolution unfolded."""
    return product.mT if table else product.reshape(weight.shape)


def _head(model: nn.Module) -> set[str]:
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    return expand(model, ("head",)) if trainable else set()


def _listed(names: tuple[str, ...] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) and names else tuple(names)
