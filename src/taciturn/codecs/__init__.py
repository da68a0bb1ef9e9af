"""HOW a vector is encoded. Every exported name is a part that can stand in `[method.codec]`."""

from taciturn.codecs.cast import cast
from taciturn.codecs.clip import clip
from taciturn.codecs.compose import chain, per_tensor
from taciturn.codecs.identity import identity
from taciturn.codecs.lossless import lossless
from taciturn.codecs.lowrank import lowrank
from taciturn.codecs.memory import difference, ef21, error_feedback
from taciturn.codecs.partial import partial
from taciturn.codecs.quantize import qsgd, quantize, quantize2, quantize4, quantize8, sign, ternary
from taciturn.codecs.sketch import rotated, sketch
from taciturn.codecs.sparsify import rand_k, sparsify, top_k

__all__ = [
    "cast",
    "chain",
    "clip",
    "difference",
    "ef21",
    "error_feedback",
    "identity",
    "lossless",
    "lowrank",
    "partial",
    "per_tensor",
    "qsgd",
    "quantize",
    "quantize2",
    "quantize4",
    "quantize8",
    "rand_k",
    "rotated",
    "sign",
    "sketch",
    "sparsify",
    "ternary",
    "top_k",
]
