"""payload <-> bytes, and the ledger that counts them."""

from taciturn.wire.format import FRAME, Frame, Schema, nbytes, pack, unpack
from taciturn.wire.ledger import Ledger

__all__ = ["FRAME", "Frame", "Ledger", "Schema", "nbytes", "pack", "unpack"]
