"""What is shared and what stays on the client, by parameter name.

Symbols: d shared parameters in x0, p personal parameters in v0, q tracked buffers in b0. Parameters that do not require
a gradient, and buffers that training does not change, are constants: every client has them from the start.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from taciturn.core.errors import MethodError, ModelError, require, unknown
from taciturn.core.state import State
from taciturn.core.types import Record, Split
from taciturn.core.vector import Layout

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def cut(
    model: nn.Module,
    tracked: frozenset[str],
    is_personal: Callable[[str], bool],
    called: Callable[[str], str] = lambda name: name,
) -> Split:
    """The split whose personal side holds the parameters that `is_personal` names; the shared ones are `called` so."""
    trainable = _tensors(model)
    if not trainable:
        raise ModelError("the model has no parameter that requires a gradient; nothing can be trained")
    names = {called(name): name for name in trainable if not is_personal(name)}
    shared = {label: trainable[name] for label, name in names.items()}
    personal = {name: t for name, t in trainable.items() if is_personal(name)}
    buffers = {name: t.detach() for name, t in model.named_buffers() if name in tracked}
    dtype = next(iter(trainable.values())).dtype
    layout, mine, stats = Layout.of(shared), Layout.of(personal), Layout.of(buffers)

    def join(held: State, y: Record, v: Record) -> Record:
        return {**{names[label]: t for label, t in y.items()}, **v}

    device = next(iter(trainable.values())).device
    x0, v0, b0 = (side.flatten(t, dtype).to(device) for side, t in ((layout, shared), (mine, personal), (stats, buffers)))
    return Split(layout, mine, stats, x0, v0, b0, join)


def refuse_tracked(tracked: Iterable[str], is_personal: Callable[[str], bool]) -> None:
    """Statistics that a module keeps beside shared parameters would be averaged or lost: refuse, with the remedy."""
    loose = [name for name in tracked if not is_personal(name)]
    if loose:
        raise ModelError(
            f"training changes the buffers {', '.join(sorted(loose)[:3])}{' ..' if len(loose) > 3 else ''} (running "
            "statistics of BatchNorm), which are not parameters and cannot be averaged. Remedies: keep norms personal, "
            'partition = layers(personal="norms") (FedBN); or use GroupNorm or LayerNorm; or freeze the statistics with '
            "module.track_running_stats = False"
        )


@dataclass(frozen=True, slots=True)
class full:
    """Every trainable parameter is shared: d = all, p = 0. Errors: `ModelError` for a model with running statistics."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """Cut the model."""
        refuse_tracked(tracked, lambda name: False)
        return cut(model, tracked, lambda name: False)


@dataclass(frozen=True, slots=True)
class local:
    """Every trainable parameter and running statistic stays on the client: d = 0, p = all. Training alone, the baseline
    that sharing has to beat: messages are empty. Errors: `ModelError` for a model without trainable parameters.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """Cut the model."""
        return cut(model, tracked, lambda name: True)


@dataclass(frozen=True, slots=True)
class layers:
    """Some parameters are shared, the others stay on the client. Give `personal` or `shared`, the other is the rest.

    Each is a list of names of modules or parameters (a name covers all below it), patterns with * and ?, or one of the
    helpers "head" (the last module with parameters), "stem" (the first), "norms" (all normalisation layers, with their
    running statistics: FedBN, Li et al. 2021). Errors: `UnknownName` for a name that matches nothing, `MethodError` for
    an empty side.
    """

    personal: tuple[str, ...] | str = ()
    shared: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        require(bool(self.personal) != bool(self.shared), f"layers: give personal or shared, one of the two; got {self}")

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """Cut the model."""
        wanted = self.personal or self.shared
        names = expand(model, (wanted,) if isinstance(wanted, str) else wanted)
        invert = bool(self.shared)

        def is_personal(name: str) -> bool:
            return below(name, names) != invert

        refuse_tracked(tracked, is_personal)
        _refuse_torn(model, is_personal)
        split = cut(model, tracked, is_personal)
        if split.layout.d == 0 or split.personal.d == 0:
            side = "shared" if split.layout.d == 0 else "personal"
            raise MethodError(f"layers: no trainable parameter is {side} under {self}; full() shares all")
        return split


def below(parameter: str, names: Iterable[str]) -> bool:
    """Whether a parameter is one of these names, or lies below one of these modules."""
    return any(parameter == name or parameter.startswith(name + ".") for name in names)


def _owner(parameter: str) -> str:
    """The module that holds a parameter; the parameter itself if that is the whole model."""
    return parameter.rpartition(".")[0] or parameter


def _refuse_torn(model: nn.Module, is_personal: Callable[[str], bool]) -> None:
    """One tensor under a shared and a personal name cannot be both."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        if len({is_personal(name) for name in group}) > 1:
            raise ModelError(
                f"{' and '.join(group)} are one tensor (tied weights), and this partition shares one name and keeps the "
                "other personal; name both, or untie them"
            )


def expand(model: nn.Module, wanted: Iterable[str]) -> set[str]:
    """Helpers and patterns -> names of modules and parameters."""
    modules = dict(model.named_modules())
    trainable = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    known = {name for name in modules if name} | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names: set[str] = set()
    for word in wanted:
        found: set[str] = set()
        if word in known:
            found = {word}
        elif word == "head":
            found = {_owner(name) for name in trainable[-1:]}
        elif word == "stem":
            found = {_owner(name) for name in trainable[:1]}
        elif word == "norms":
            found = {name for name, module in modules.items() if isinstance(module, NORMS)}
            if not found:
                raise ModelError("method.partition: the model has no normalisation layer to keep personal")
        else:
            found = set(fnmatch.filter(known, word))
        if not found:
            raise unknown("module or parameter", word, known | {"head", "stem", "norms"}, "method.partition")
        names |= found
    return names
