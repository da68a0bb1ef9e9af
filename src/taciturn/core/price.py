"""What a round costs in time (or in money, in any unit): a line, a machine, and the sum of both.

Symbols: T local steps of the slowest client of a cohort; bytes up and down for each client; R round trips.
"""

from __future__ import annotations

from dataclasses import dataclass

from taciturn.core.errors import require


@dataclass(frozen=True, slots=True)
class Price:
    """seconds = T step_seconds + up / self.up + down / self.down + R latency.

    step_seconds: of one local step; None: measured in the first round, by the clock of the machine that runs it (then two
    runs need not be alike). up, down: bytes a second on a client's line. latency: seconds of a round trip.
    The defaults are a thin line: 10 Mbit/s up, 50 Mbit/s down, 50 ms.

    >>> Price(step_seconds=0.01, up=1000.0, down=2000.0, latency=0.1).seconds(steps=50, up=4000, down=4000, exchanges=2)
    6.7
    """

    step_seconds: float | None = None
    up: float = 1.25e6
    down: float = 6.25e6
    latency: float = 0.05

    def __post_init__(self) -> None:
        good = self.step_seconds is None or self.step_seconds > 0
        require(good, f"price.step_seconds: seconds above 0; got {self.step_seconds}")
        require(self.up > 0 and self.down > 0, f"price: up and down are bytes a second; got {self.up}, {self.down}")
        require(self.latency >= 0, f"price.latency: seconds, at least 0; got {self.latency}")

    def seconds(self, *, steps: float, up: float, down: float, exchanges: float) -> float:
        """The cost of a round: steps of the slowest client, bytes of each, round trips. Errors: none; step_seconds None
        counts as 0.
        """
        return (self.step_seconds or 0.0) * steps + up / self.up + down / self.down + exchanges * self.latency

    @classmethod
    def crossing(cls, epochs: float, *, model_bytes: float, epoch_steps: float, latency: float = 0.0) -> Price:
        """The price at which sending the model once, one way, costs as much as `epochs` local epochs; a local step is the
        unit of time. latency: of a round trip, as a fraction of sending the model once.

        >>> Price.crossing(5, model_bytes=400, epoch_steps=10).seconds(steps=10, up=400, down=400, exchanges=0)
        110.0
        """
        once = epochs * epoch_steps
        return cls(step_seconds=1.0, up=model_bytes / once, down=model_bytes / once, latency=latency * once)
