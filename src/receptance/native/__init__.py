"""The CPU engine: RWKV-4 to 7 without torch. docs/native.md says how it works and how fast it is.

`NativeModel` runs on a core in C++ (csrc/, compiled when the package is installed), or in NumPy where there is none.
"""

from receptance.native.config import NativeConfig, read_config, tensor_shapes
from receptance.native.library import NoCoreError, load_core
from receptance.native.model import DTYPES, NativeModel
from receptance.native.state import State

__all__ = ["DTYPES", "NativeConfig", "NativeModel", "NoCoreError", "State", "load_core", "read_config", "tensor_shapes"]
