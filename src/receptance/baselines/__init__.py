"""What RWKV is compared with: a LLaMA-style Transformer and gated RNNs, in the frame that RWKV itself has.

Embedding, head, loss, packing and trainer are shared, so that only the blocks differ.
"""

from receptance.baselines.budget import fit_budget
from receptance.baselines.files import load_baseline, save_baseline
from receptance.baselines.rnn import RNN, RNNConfig
from receptance.baselines.transformer import Transformer, TransformerConfig

BASELINES: dict[str, type[Transformer] | type[RNN]] = {"transformer": Transformer, "lstm": RNN, "gru": RNN}

__all__ = [
    "BASELINES",
    "RNN",
    "RNNConfig",
    "Transformer",
    "TransformerConfig",
    "fit_budget",
    "load_baseline",
    "save_baseline",
]
