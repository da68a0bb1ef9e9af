"""Fleets: which devices there are, and which client has which.

The numbers of the named fleets are typical values that were chosen, not measured; `taciturn profile` measures a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import require, unknown
from taciturn.core.random import Key
from taciturn.fleet.profile import Dtype, Profile


@dataclass(frozen=True, slots=True)
class Fleet:
    """Profiles with their shares. Errors: `ConfigError` for none, or for two of one name."""

    profiles: tuple[Profile, ...] = (Profile(),)

    def __post_init__(self) -> None:
        names = [profile.name for profile in self.profiles]
        require(bool(names), "profiles: at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"profiles: each has a name of its own; got {', '.join(twice)} more than once")

    def assign(self, clients: int, key: Key) -> Tensor:
        """The number of each client's profile [clients] int64: the shares, as exactly as whole clients allow, in a random
        order.
        """
        if len(self.profiles) == 1:
            return torch.zeros(1, dtype=torch.int64).expand(clients)
        shares = torch.tensor([profile.share for profile in self.profiles], dtype=torch.float64)
        edges = shares.cumsum(0) / shares.sum()
        places = (random.permutation(key, clients).to(torch.float64) + 0.5) / max(1, clients)
        return torch.searchsorted(edges, places).clamp(max=len(self.profiles) - 1)

    def has_kernels(self, dtypes: Sequence[Dtype]) -> Tensor:
        """Which profile has fast matrix products in which dtype: [P, len(dtypes)] bool.

        >>> Fleet().has_kernels(("float32", "bfloat16")).tolist()
        [[True, False]]
        """
        return torch.tensor([[dtype in profile.kernels for dtype in dtypes] for profile in self.profiles])


MBIT = 1e6 / 8  # bytes a second


def phones() -> Fleet:
    """Phones: three ages, on mobile lines; reached when they are idle and charge."""
    return Fleet(
        (
            Profile("phone new", 0.3, 60.0, 150.0, 250.0, 25.0, 8e-6, 20 * MBIT, 100 * MBIT, 0.04, 3e9, 0.5),
            Profile("phone usual", 0.5, 20.0, None, 60.0, 12.0, 12e-6, 8 * MBIT, 40 * MBIT, 0.06, 1.5e9, 0.4),
            Profile("phone old", 0.2, 6.0, None, None, 5.0, 25e-6, 2 * MBIT, 10 * MBIT, 0.1, 0.8e9, 0.25),
        )
    )


def factory() -> Fleet:
    """Plants: gateways and small computers beside the machines, on wires that are shared."""
    return Fleet(
        (
            Profile("gateway", 0.6, 80.0, None, 200.0, 15.0, 6e-6, 50 * MBIT, 50 * MBIT, 0.02, 6e9, 0.98),
            Profile("small computer", 0.3, 15.0, None, 30.0, 4.0, 15e-6, 20 * MBIT, 20 * MBIT, 0.02, 2e9, 0.95),
            Profile("radio link", 0.1, 15.0, None, 30.0, 4.0, 15e-6, 1 * MBIT, 2 * MBIT, 0.15, 2e9, 0.8),
        )
    )


def datacentre() -> Fleet:
    """Servers of few owners: many cores or an accelerator, on fast lines between sites."""
    return Fleet(
        (
            Profile("server", 0.7, 1500.0, 6000.0, 9000.0, 150.0, 5e-6, 1000 * MBIT, 1000 * MBIT, 0.02, 200e9),
            Profile("accelerator", 0.3, 30000.0, 300000.0, 600000.0, 1500.0, 6e-6, 1000 * MBIT, 1000 * MBIT, 0.02, 60e9),
        )
    )


def mixed() -> Fleet:
    """The reference device, slower by 1, 2, 4 and 8, each on lines of 100, 20 and 5 Mbit/s: equal shares of twelve."""
    base = Profile()
    return Fleet(
        tuple(
            replace(
                base,
                name=f"{slower}x slower, {line} Mbit/s",
                float32=base.float32 / slower,
                bandwidth=base.bandwidth / slower,
                launch=base.launch * slower,
                up=line * MBIT,
                down=line * MBIT,
            )
            for slower in (1, 2, 4, 8)
            for line in (100, 20, 5)
        )
    )


FLEETS = {"reference": Fleet, "phones": phones, "factory": factory, "datacentre": datacentre, "mixed": mixed}


def named(name: str) -> Fleet:
    """A fleet by its name. Errors: `UnknownName`.

    >>> [profile.name for profile in named("phones").profiles]
    ['phone new', 'phone usual', 'phone old']
    """
    if name not in FLEETS:
        raise unknown("fleet", name, FLEETS, "fleet")
    return FLEETS[name]()
