"""An update of bounded length, with noise of the client's own: what a guarantee of differential privacy starts from.

Symbols: u [d] the vector; C norm; z noise; m count; n [d] standard normal; encode: that of the codec within.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from taciturn.codecs.identity import identity
from taciturn.core import secret
from taciturn.core.errors import require
from taciturn.core.random import Key, fold
from taciturn.core.state import State
from taciturn.core.types import Codec, Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class clip:
    """C(u) = codec(u min(1, C / |u|) + (z C / sqrt(m)) n). A u that is not finite becomes 0 before the noise; where
    there is none, the server sees and refuses it.

    noise z > 0: in the SUM of m = count clients' messages, whoever adds it up, the noise has standard deviation z C; in
    one message z C / sqrt(m). The client then tells no loss (it is 0 in the record), for it would be told without noise.
    What the codec within does, and what it remembers, follows the noise and costs no privacy. delta: of the guarantee that
    the record states. secret: noise of the operating system in place of the run's key; real sites set it. Stands outermost.
    State of the codec within. Source: McMahan et al. 2018 (arXiv 1710.06963); Kairouz et al. 2021 (arXiv 2102.06387),
    without its secure aggregation.
    """

    codec: Codec = field(default_factory=identity)
    norm: float = 1.0
    noise: float = 0.0
    count: int = 1
    delta: float = 1e-5
    secret: bool = False

    def __post_init__(self) -> None:
        require(0 < self.norm < math.inf, f"clip.norm: a length above 0; got {self.norm}")
        require(0 <= self.noise < math.inf, f"clip.noise: a multiple of the norm, at least 0; got {self.noise}")
        require(self.count >= 1, f"clip.count: clients whose noise adds up, at least 1; got {self.count}")
        require(0 < self.delta < 1, f"clip.delta: between 0 and 1; got {self.delta}")

    @property
    def lossy(self) -> bool:
        """Always."""
        return True

    @property
    def unbiased(self) -> bool:
        """Never: what is longer than C becomes shorter."""
        return False

    @property
    def silent(self) -> bool:
        """True if the client tells nothing beside its noisy message."""
        return self.noise > 0

    @property
    def message_noise(self) -> float:
        """z / sqrt(m): standard deviation of the noise in one message, relative to C."""
        return self.noise / math.sqrt(self.count)

    def message_bits(self, d: int) -> float:
        """The codec's."""
        return self.codec.message_bits(d)

    def omega(self, d: int) -> float:
        """(1 + sqrt(omega))^2 of the codec's; infinite with noise."""
        return math.inf if self.silent else (1 + math.sqrt(self.codec.omega(d))) ** 2

    def init(self, layout: Layout) -> tuple[State, State]:
        """The codec's."""
        return self.codec.init(layout)

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """The codec's payload of the clipped, noisy vector."""
        whole = u.float().double()  # the scale may be below the least normal float32
        length = whole.square().sum(-1).sqrt()
        scale = self.norm / length.clamp(min=self.norm)
        u = (whole * torch.where(torch.isfinite(length), scale, torch.nan)).float()
        if self.silent:
            u = torch.where(torch.isfinite(length), u, 0.0)
            drawn = secret.gaussian(None if self.secret else fold(key, "noise"), layout.d)
            u = u + self.norm * self.message_noise * drawn.to(u)
        return self.codec.encode(u, tx, key, layout=layout, knobs=knobs)

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The codec's."""
        return self.codec.decode(payload, rx, layout=layout)
