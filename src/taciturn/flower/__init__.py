"""For those who have a ServerApp and a ClientApp of Flower and want to keep them: a mod for the client, a wrapper for the
strategy. Needs `pip install 'taciturn[flower]'`; whole federated methods, deployed, are `taciturn deploy` (docs/deploy.md).
"""

from taciturn.flower.accounts import Ledgered, ledger_mod
from taciturn.flower.compress import Compressed, compress_mod
from taciturn.flower.dynamic import FdaOpt, fda_mod
from taciturn.flower.lora import LoraAggregation

__all__ = ["Compressed", "FdaOpt", "Ledgered", "LoraAggregation", "compress_mod", "fda_mod", "ledger_mod"]
