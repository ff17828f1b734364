"""The number formats of GGUF tensors. Matrices in blocks are `native.blocks.Blocks`, plain ones NumPy arrays.

Formats and layouts: ggml-org/ggml, `ggml-common.h` and `ggml-quants.c`. Every row is a whole number of blocks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """`code` is ggml's number for it; a block holds `elements` numbers in `nbytes` bytes."""

    name: str
    code: int
    elements: int
    nbytes: int

    @property
    def is_plain(self) -> bool:
        return self.elements == 1

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor; ValueError unless its rows are whole blocks."""
        if shape[-1] % self.elements:
            raise ValueError(f"rows of {shape[-1]} numbers are no whole blocks of {self.elements} ({self.name})")
        return math.prod(shape) // self.elements * self.nbytes


FORMATS = {
    format.name: format
    for format in (
        Format("float32", 0, 1, 4),
        Format("float16", 1, 1, 2),
        Format("bfloat16", 30, 1, 2),
        Format("Q4_0", 2, 32, 18),
        Format("Q8_0", 8, 32, 34),
        Format("Q4_K", 12, 256, 144),
        Format("Q5_K", 13, 256, 176),
        Format("Q6_K", 14, 256, 210),
    )
}
BLOCK_FORMATS = {name: format for name, format in FORMATS.items() if not format.is_plain}
BY_CODE = {format.code: format for format in FORMATS.values()}
# known only so that a message can say what was found
OTHER_CODES = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS"}
OTHER_CODES |= {17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"}
OTHER_CODES |= {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"}
OTHER_CODES |= {39: "MXFP4"}

SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes where float16 scales lie

CHUNK = 1 << 19  # numbers worked on at once: bounds the memory beside the result


def row_pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about CHUNK numbers."""
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
