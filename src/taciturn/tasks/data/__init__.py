"""WHERE the data come from and how they are divided. Every exported name is a part that can stand in `[data]`.

A source (a class with `load(seed) -> Federation`) is the table `[data]` itself; a split stands in its field `split`.
"""

from taciturn.tasks.data.files import folder, table
from taciturn.tasks.data.real import activity, air, heart, turbofan
from taciturn.tasks.data.sources import digits, fashion, mnist5k
from taciturn.tasks.data.splits import dirichlet, iid, shards
from taciturn.tasks.data.synthetic import least_squares
from taciturn.tasks.data.texts import banking, bbc, bbc_pairs, bbc_text, clinc, mrpc

__all__ = [
    "activity",
    "air",
    "banking",
    "bbc",
    "bbc_pairs",
    "bbc_text",
    "clinc",
    "digits",
    "dirichlet",
    "fashion",
    "folder",
    "heart",
    "iid",
    "least_squares",
    "mnist5k",
    "mrpc",
    "shards",
    "table",
    "turbofan",
]
