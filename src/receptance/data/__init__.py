"""Text files, token files and the order in which a run reads them."""

from receptance.data.binidx import BinIdx, BinIdxWriter
from receptance.data.order import ORDERS, CubicWindows, ShuffledWindows
from receptance.data.prepare import prepare
from receptance.data.text import documents

__all__ = ["ORDERS", "BinIdx", "BinIdxWriter", "CubicWindows", "ShuffledWindows", "documents", "prepare"]
