"""Texts, token files and the order in which a run reads them."""

from receptance.data.binidx import BinIdx, BinIdxWriter
from receptance.data.mixture import Mixture
from receptance.data.order import ORDERS, CubicWindows, ShuffledWindows
from receptance.data.packing import IGNORE, Contiguous, Documents, Packing, Rows
from receptance.data.prepare import Manifest, Progress, prepare, read_manifest, tokenizer_identity
from receptance.data.sources import documents

__all__ = [
    "IGNORE",
    "ORDERS",
    "BinIdx",
    "BinIdxWriter",
    "Contiguous",
    "CubicWindows",
    "Documents",
    "Manifest",
    "Mixture",
    "Packing",
    "Progress",
    "Rows",
    "ShuffledWindows",
    "documents",
    "prepare",
    "read_manifest",
    "tokenizer_identity",
]
