"""Checkpoints: read and write RWKV weights in every common layout, exactly, and without running anything from a file.

`load` and `save` are all that most callers need. `open_checkpoint` lists a file's tensors without reading them, and
without torch; `detect` tells version and Config from names and shapes; `fingerprint` names a set of weights.
docs/checkpoints.md says which layouts are known, what the checksums cover and what is refused.
"""

from .detect import detect
from .load import fingerprint, load, open_checkpoint
from .save import save
from .source import StoredTensor, TensorSource

__all__ = ["StoredTensor", "TensorSource", "detect", "fingerprint", "load", "open_checkpoint", "save"]
