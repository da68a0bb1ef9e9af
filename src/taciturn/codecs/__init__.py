"""HOW a vector is encoded. Every exported name is a part that can stand in `[method.codec]`."""

from taciturn.codecs.cast import cast
from taciturn.codecs.identity import identity
from taciturn.codecs.lossless import lossless

__all__ = ["cast", "identity", "lossless"]
