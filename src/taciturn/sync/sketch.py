"""The AMS sketch: a few numbers, linear in the vector, from which its squared norm can be estimated.

Symbols: d values of a vector v; m rows; b columns; F [6, m] int64, coefficients of the hashes of all rows, the same on
every client; table [m, d] int16, bucket and sign of each position; sk [.., m, b] float32.

    sk[j, q] = sum over i in bucket q of row j of s_j(i) v_i,   s_j(i) = +1 or -1
    ||v||^2  ~ median over j of sum_q sk[j, q]^2;  relative standard deviation of one row: sqrt(2 / b)

sk(a u + c v) = a sk(u) + c sk(v), so the mean of the clients' sketches is the sketch of their mean, if all have the same
F. The hashes are those of FDA: they fold by XOR where the field of 2^31 - 1 needs an addition, and so are only close to
2-wise (buckets) and 4-wise (signs) independent. A table takes 2 m bytes a position.
Source: Alon, Matias & Szegedy 1996; Cormode & Garofalakis 2005 (one bucket a row for each position: fast-AMS);
Theologitis et al., arXiv 2405.20988 and 2505.04535.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from taciturn.core import eager, kernel, random
from taciturn.core.errors import require

PRIME = (1 << 31) - 1
MOST = 1 << 15  # columns that the entries of a table can name


def coefficients(seed: int, rows: int) -> Tensor:
    """F: uniform in 0..2^31 - 2, [6, rows] int64; row j is the same whatever the number of rows."""
    require(rows >= 1, f"rows: at least 1; got {rows}")
    drawn = random.bits(random.fold(random.key(seed), "sketch"), 6 * rows)
    return (eager.shift(drawn, 1) % PRIME).view(rows, 6).T.contiguous()


@lru_cache(maxsize=2)
def table(seed: int, d: int, rows: int, columns: int) -> Tensor:
    """Bucket (low 15 bits) and sign (negative: minus) of the positions 0..d-1: [rows, d] int16, to be read only.

    The latest two are kept. Errors: `ConfigError` for rows < 1, columns not of 1..32768, d not of 0..2^31 - 1.
    """
    require(1 <= columns <= MOST, f"columns: 1 to {MOST}; got {columns}")
    require(0 <= d <= PRIME, f"a sketch takes vectors of up to {PRIME:,} values; got {d:,}")
    made: Tensor = kernel.ams_table(coefficients(seed, rows), 0, d, columns)
    return made


def sketch(u: Tensor, table: Tensor, columns: int) -> Tensor:
    """sk: u [.., d] float32, table [rows, d] of as many columns -> [.., rows, columns] float32, summed in float64.

    What is not finite propagates. Errors: `ConfigError` for a table of other vectors, or columns not of 1..32768.
    """
    require(1 <= columns <= MOST, f"columns: 1 to {MOST}; got {columns}")
    require(
        u.shape[-1] == table.shape[-1] and (u.dtype, table.dtype) == (torch.float32, torch.int16),
        f"u {list(u.shape)} {u.dtype}, table {list(table.shape)} {table.dtype}; wanted [.., d] float32, [rows, d] int16",
    )
    made: Tensor = kernel.ams(u, table, columns)
    return made


def energy(sk: Tensor) -> Tensor:
    """The estimate of ||v||^2: lower median over the rows of sum_q sk[j, q]^2, [.., rows, columns] -> [..] float64."""
    return sk.double().square().sum(-1).median(-1).values
