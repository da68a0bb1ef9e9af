"""Weights of a linear layer that nobody forms: the model of the round's start, and what was learnt since as two factors.

Where a step is W <- W - lr (G' X + mu (W - W0)), the weight after some steps is

    W = W0 - lr H' X      X [K, i] the inputs of those steps, row by row; H [K, o] the gradients of their outputs,
                          those of a step shrunk by (1 - lr mu) in every later step

so that  x W' = x W0' - lr (x X') H  and  g W = g W0 - lr (g H') X. The large products are with W0, which all clients of a
block share and which stays in the processor's cache; what is each client's own are thin products, and its update is formed
once, when the round ends. This is exact, and it pays while K (i + o) < i o; beyond it the weight is formed.

Symbols: m clients of a part, k of them still training; n rows of a client in a step (samples, or samples times positions).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """One weight [o, i] of m clients. steps: the most that are to come, for the size of the memory."""

    def __init__(self, base: Tensor, m: int, lr: float, mu: float, steps: int) -> None:
        self.base, self.lr, self._shrink, self._steps = base, lr, 1.0 - lr * mu, steps
        self._m, self.filled, self.rows = m, 0, 0
        self._counts = torch.zeros(m, dtype=torch.int64)

    @property
    def most(self) -> int:
        """Rows up to which the factors are cheaper than the weight: o i / (o + i)."""
        o, i = self.base.shape
        return o * i // (o + i)

    @property
    def full(self) -> bool:
        """True if another step would make the factors dearer than the weight."""
        return self.filled > 0 and self.filled + self.rows > self.most

    def forward(self, x: Tensor, k: int) -> Tensor:
        """x [k n, i] -> x W' [k n, o]."""
        y = x @ self.base.T
        if self.filled:
            inner = torch.bmm(x.view(k, -1, x.shape[-1]), self._x[:k, : self.filled].mT)
            y.view(k, -1, y.shape[-1]).baddbmm_(inner, self._h[:k, : self.filled], alpha=-self.lr)
        return y

    def backward(self, g: Tensor, k: int) -> Tensor:
        """g [k n, o] -> g W [k n, i]."""
        dx = g @ self.base
        if self.filled:
            inner = torch.bmm(g.view(k, -1, g.shape[-1]), self._h[:k, : self.filled].mT)
            dx.view(k, -1, dx.shape[-1]).baddbmm_(inner, self._x[:k, : self.filled], alpha=-self.lr)
        return dx

    def learn(self, g: Tensor, x: Tensor, k: int) -> None:
        """One step: g [k n, o], x [k n, i]."""
        g, x = g.view(k, -1, g.shape[-1]), x.view(k, -1, x.shape[-1])
        if not self.filled:
            self.rows = x.shape[1]
            room = min(self.most // self.rows, self._steps) * self.rows
            if room > self.rows:
                self._x, self._h = (t.new_empty(self._m, room, t.shape[-1]) for t in (x, g))
            else:  # one step is all that is kept: as it is
                self._x, self._h = x, g = x.detach(), g.detach()
        elif self._shrink != 1.0:
            self._h[:k, : self.filled] *= self._shrink
        place = slice(self.filled, self.filled + self.rows)
        if self._x is not x:
            self._x[:k, place], self._h[:k, place] = x, g
            self._x[k:, place], self._h[k:, place] = 0.0, 0.0  # who rests in this step may go on in a later stride
        self.filled = place.stop
        self._counts[:k] = place.stop

    def drift(self, out: Tensor) -> None:
        """Write W - W0 = -lr H' X into out [m, o i]."""
        if not self.filled:
            out.zero_()
            return
        for place, h, x, count in zip(out, self._h, self._x, self._counts.tolist(), strict=True):
            w = place.view(self.base.shape)
            torch.addmm(w, h[:count].T, x[:count], beta=0, alpha=-self.lr, out=w)

    def total(self, weights: Tensor) -> Tensor:
        """Sum over clients of weight [m] times W - W0 -> [o i]: one product over the rows of all."""
        o, i = self.base.shape
        if not self.filled:
            return self.base.new_zeros(o * i)
        x, h = self._x[:, : self.filled], self._h[:, : self.filled] * weights[:, None, None]
        if int(self._counts.min()) < self.filled:  # rows that a client has not written
            mine = (torch.arange(self.filled) < self._counts.unsqueeze(1)).to(x.device).unsqueeze(2)
            x, h = torch.where(mine, x, 0.0), torch.where(mine, h, 0.0)
        w = self.base.new_empty(o, i)
        return torch.addmm(w, h.reshape(-1, o).T, x.reshape(-1, i), beta=0, alpha=-self.lr, out=w).flatten()

    def weight(self) -> Tensor:
        """W [m, o, i], formed."""
        if self.filled and int(self._counts.min()) == self.filled:
            return torch.baddbmm(self.base, self._h[:, : self.filled].mT, self._x[:, : self.filled], alpha=-self.lr)
        w = self.base.new_empty(self._m, *self.base.shape)
        self.drift(w.view(self._m, -1))
        return w.add_(self.base)

    def reorder(self, order: Tensor) -> None:
        """The clients in another order."""
        if self.filled:
            at = order.to(self._x.device)
            self._x, self._h = self._x[at], self._h[at]
        self._counts = self._counts[order]
