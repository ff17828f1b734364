"""What gemv.cuh and those who launch it share."""

NONE, TANH, SIGMOID, RELU_SQUARE = range(4)  # Activation
WRITE, ADD, LOGITS, GATED = range(4)  # gemv::Mode
WARPS, DEPTH = 16, 4  # of a block; steps of a ring


def ring_bytes(depth: int, row_tiles: int = 1) -> int:
    return WARPS * depth * row_tiles * 1024


def sums_bytes(batch_tiles: int, row_tiles: int = 1) -> int:
    return WARPS * row_tiles * 16 * (8 * batch_tiles + 1) * 4
