"""Numbers into GGUF's blocks, by least squares: the scales that leave the smallest squared error are searched for.

For each sub-block several roundings are tried, each with its best scale (and minimum). Where a super-block rounds the
scales themselves, its own two factors are then fitted to all 256 numbers, and neighbouring scales are tried.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from receptance.errors import CheckpointError
from receptance.gguf.formats import BLOCK_FORMATS, SCALES, row_pieces
from receptance.native.blocks import Array, Blocks, Bytes

Int = NDArray[np.float32]  # whole numbers, kept as floats while they are searched


def quantise(x: Array, format: str) -> Blocks:
    """A matrix [rows, columns] of finite float32 in blocks. Raises CheckpointError where that cannot be."""
    rows, columns = x.shape
    size = BLOCK_FORMATS[format]
    if columns % size.elements:
        raise CheckpointError(f"rows of {columns} numbers are no whole blocks of {size.elements} ({format})")
    data = np.empty((rows, columns // size.elements * size.nbytes), np.uint8)
    for first, last in row_pieces(rows, columns):
        data[first:last] = pack(np.asarray(x[first:last], np.float32), format).reshape(last - first, -1)
    return Blocks(format, (rows, columns), data)


def dequantise(blocks: Blocks) -> Array:
    """All the numbers, exactly, as float32; piece by piece, so that little memory is needed beside them."""
    rows, columns = blocks.shape
    out = np.empty((rows, columns), np.float32)
    for first, last in row_pieces(rows, columns):
        out[first:last] = blocks.rows(first, last).to_float()
    return out


def scaled(blocks: Blocks, factor: float) -> Blocks:
    """Every number times a power of two, by its scales alone: exact unless a scale leaves float16's range."""
    data = np.array(blocks.data).reshape(-1, BLOCK_FORMATS[blocks.format].nbytes)
    for start in SCALES[blocks.format]:
        scale = np.ascontiguousarray(data[:, start : start + 2]).view("<f2")
        data[:, start : start + 2] = (scale * np.float16(factor)).view(np.uint8)
    return Blocks(blocks.format, blocks.shape, data)


def pack(x: Array, format: str) -> Bytes:
    """Some whole rows as bytes, block after block."""
    blocks = np.ascontiguousarray(x).reshape(-1, BLOCK_FORMATS[format].elements)
    largest = np.abs(blocks).max(initial=0)
    # a float16 scale of at most 65504 must carry the block
    if not largest < 65504 * 8:
        raise CheckpointError(f"the number {largest} cannot be quantised; is the checkpoint damaged?")
    return PACK[format](blocks)


def rounded_half(x: Array) -> Array:
    """As it will be stored."""
    return x.astype(np.float16).astype(np.float32)


def over(x: Array, scale: Array) -> Array:
    """x / scale, and 0 where the scale is 0."""
    return x * np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def half_bytes(x: Array) -> Bytes:
    """[n, 1] → [n, 2]."""
    return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def fitted(x: Array, low: int, high: int, widths: NDArray[np.float64]) -> Array:
    """The scale s [n, 1] for which s · round(x / s), held within low..high, comes closest to x [n, m].

    Tried: the number furthest from zero becoming each of `widths`; each rounding then gets its best scale.
    """
    furthest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    best_gain = np.zeros((len(x), 1), np.float32)
    best = np.zeros_like(best_gain)
    for width in widths:
        q = np.clip(np.rint(over(x, furthest / np.float32(width))), low, high)
        dot, norm = np.einsum("nm,nm->n", x, q)[:, None], np.einsum("nm,nm->n", q, q)[:, None]
        scale = over(dot, norm)
        gain = dot * scale  # Σx² - gain is the squared error
        is_better = gain > best_gain
        np.copyto(best_gain, gain, where=is_better)
        np.copyto(best, scale, where=is_better)
    return best


def squared_error(x: Array, approximation: Array) -> Array:
    """Summed over the last axis."""
    difference = x - approximation
    total: Array = np.einsum("...m,...m->...", difference, difference)
    return total


# 32 numbers, one scale --------------------------------------------------------------------------------------------


def closest_half(x: Array, scale: Array, low: int, high: int) -> tuple[Array, Int]:
    """Of the float16 numbers around a scale the best, and the rounding it gives."""
    middle = scale.astype(np.float16)
    best_error = np.full((len(x), 1), np.inf, np.float32)
    best_scale, best_q = np.zeros_like(scale), np.zeros_like(x)
    for stored in (middle, np.nextafter(middle, np.float16(np.inf)), np.nextafter(middle, np.float16(-np.inf))):
        candidate = np.where(np.isfinite(stored), stored, middle).astype(np.float32)
        q = np.clip(np.rint(over(x, candidate)), low, high)
        error = squared_error(x, candidate * q)[:, None]
        is_better = error < best_error
        np.copyto(best_error, error, where=is_better)
        np.copyto(best_scale, candidate, where=is_better)
        np.copyto(best_q, q, where=is_better)
    return best_scale, best_q


def pack_q8_0(x: Array) -> Bytes:
    scale, q = closest_half(x, fitted(x, -127, 127, np.arange(125, 128.01, 0.25)), -127, 127)
    return np.concatenate([half_bytes(scale), q.astype(np.int8).view(np.uint8)], 1)


def pack_q4_0(x: Array) -> Bytes:
    widths = np.concatenate([-np.arange(6, 9.01, 0.2), np.arange(6, 8.01, 0.2)])
    scale, q = closest_half(x, fitted(x, -8, 7, widths), -8, 7)
    bits = (q + 8).astype(np.uint8)
    return np.concatenate([half_bytes(scale), bits[:, :16] | bits[:, 16:] << 4], 1)


# Super-blocks of 256 ------------------------------------------------------------------------------------------------


def line_fitted(x: Array, highest: int) -> tuple[Array, Array]:
    """Scale s and minimum m ≥ 0, each [n, 8], so that s · q - m with q in 0..highest comes closest to x [n, 8, 32]."""
    low = np.minimum(x.min(-1), 0)  # [n, 8]
    span = x.max(-1) - low
    count = np.float32(x.shape[-1])
    sum_x = x.sum(-1)
    best_gain = np.full(low.shape, -np.inf, np.float32)
    best_scale, best_min = np.zeros_like(low), -low
    for more in np.arange(-1.2, 1.81, 0.15 if highest < 20 else 0.3):
        inverse = over(np.full_like(span, highest + more), span)
        q = np.clip(np.rint((x - low[..., None]) * inverse[..., None]), 0, highest)
        sum_q = q.sum(-1)
        sum_qq, sum_qx = np.einsum("nbm,nbm->nb", q, q), np.einsum("nbm,nbm->nb", q, x)
        determinant = count * sum_qq - sum_q * sum_q
        scale = over(count * sum_qx - sum_q * sum_x, determinant)
        minimum = over(sum_q * sum_qx - sum_qq * sum_x, determinant)
        is_positive = minimum < 0  # no negative minimum can be stored
        scale = np.where(is_positive, over(sum_qx, sum_qq), scale)
        minimum = np.where(is_positive, 0, minimum)
        # Σx² less this is the squared error
        gain = scale * (2 * sum_qx - scale * sum_qq + 2 * minimum * sum_q) - minimum * (2 * sum_x + count * minimum)
        is_better = (gain > best_gain) & (determinant > 0)
        np.copyto(best_gain, gain, where=is_better)
        np.copyto(best_scale, scale, where=is_better)
        np.copyto(best_min, minimum, where=is_better)
    return best_scale, best_min


def nearest(x: Array, d: Array, dmin: Array, scales: Array, mins: Array, highest: int) -> tuple[Int, Array, Array]:
    """The rounding for given scales [n, 8] and factors [n, 1]: q [n, 8, 32], its lines' scales and minima [n, 8]."""
    scale, minimum = d * scales, dmin * mins
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint((x + minimum[..., None]) * inverse[..., None]), 0, highest), scale, minimum


def factors_fitted(x: Array, q: Int, scales: Array, mins: Array) -> tuple[Array, Array]:
    """d and dmin, each [n, 1], for which d · scales · q - dmin · mins comes closest to x, given the rest."""
    sum_q, sum_x = q.sum(-1, dtype=np.float64), x.sum(-1, dtype=np.float64)
    sum_qq, sum_qx = np.einsum("nbm,nbm->nb", q, q), np.einsum("nbm,nbm->nb", q, x)
    s, m = scales.astype(np.float64), mins.astype(np.float64)
    aa, bb = (s * s * sum_qq).sum(1), (m * m).sum(1) * x.shape[-1]
    ab = -(s * m * sum_q).sum(1)
    ax, bx = (s * sum_qx).sum(1), -(m * sum_x).sum(1)
    determinant = aa * bb - ab * ab
    is_line = determinant > 1e-9 * aa * bb
    safe = np.where(is_line, determinant, 1)
    d = np.where(is_line, (bb * ax - ab * bx) / safe, ax / np.where(aa > 0, aa, 1))
    dmin = np.where(is_line, (aa * bx - ab * ax) / safe, 0)
    return rounded_half(d[:, None].astype(np.float32)), rounded_half(np.maximum(dmin, 0)[:, None].astype(np.float32))


def pack_with_minima(x: Array, highest: int) -> tuple[Bytes, Bytes]:
    """The first 16 bytes of each super-block, and q [n, 8, 32]."""
    x = x.reshape(-1, 8, 32)
    best_scale, best_min = line_fitted(x, highest)
    d = rounded_half(best_scale.max(1, keepdims=True) / 63)
    dmin = rounded_half(best_min.max(1, keepdims=True) / 63)
    scales = np.clip(np.rint(over(best_scale, d)), 0, 63)
    mins = np.clip(np.rint(over(best_min, dmin)), 0, 63)
    q, scale, minimum = nearest(x, d, dmin, scales, mins, highest)
    error = squared_error(x, scale[..., None] * q - minimum[..., None])
    for _ in range(2):
        # the factors for this rounding, kept where they help with the rounding that they give in turn
        new_d, new_dmin = factors_fitted(x, q, scales, mins)
        new_q, scale, minimum = nearest(x, new_d, new_dmin, scales, mins, highest)
        new_error = squared_error(x, scale[..., None] * new_q - minimum[..., None])
        is_better = (new_error.sum(1) < error.sum(1))[:, None]
        d, dmin = np.where(is_better, new_d, d), np.where(is_better, new_dmin, dmin)
        error = np.where(is_better, new_error, error)
        q = np.where(is_better[..., None], new_q, q)
        # the neighbours of each sub-block's scale and minimum
        for up, more in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1)):
            try_scales, try_mins = np.clip(scales + up, 0, 63), np.clip(mins + more, 0, 63)
            new_q, scale, minimum = nearest(x, d, dmin, try_scales, try_mins, highest)
            new_error = squared_error(x, scale[..., None] * new_q - minimum[..., None])
            is_better = new_error < error
            scales, mins = np.where(is_better, try_scales, scales), np.where(is_better, try_mins, mins)
            np.copyto(error, new_error, where=is_better)
            np.copyto(q, new_q, where=is_better[..., None])
    s, m = scales.astype(np.uint8), mins.astype(np.uint8)
    packed = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    return np.concatenate([half_bytes(d), half_bytes(dmin), *packed], 1), q.astype(np.uint8)


def in_nibbles(q: Bytes) -> Bytes:
    """[n, 8, 32] of at most 15 → [n, 128]; pairs of sub-blocks share bytes."""
    pairs = q.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << np.uint8(4)).reshape(-1, 128)


def pack_q4_k(x: Array) -> Bytes:
    head, q = pack_with_minima(x, 15)
    return np.concatenate([head, in_nibbles(q)], 1)


def pack_q5_k(x: Array) -> Bytes:
    head, q = pack_with_minima(x, 31)
    fifth = np.bitwise_or.reduce(q >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([head, fifth, in_nibbles(q & np.uint8(15))], 1)


def pack_q6_k(x: Array) -> Bytes:
    sub = x.reshape(-1, 16)
    widths = np.concatenate([-np.arange(30, 33.01, 0.25), np.arange(30, 31.51, 0.25)])
    best = fitted(sub, -32, 31, widths).reshape(-1, 16)
    x = x.reshape(-1, 16, 16)
    largest = np.take_along_axis(best, np.abs(best).argmax(1)[:, None], 1)
    d = rounded_half(largest / np.float32(-128))
    scales = np.clip(np.rint(over(best, d)), -128, 127)

    def nearest(d: Array, scales: Array) -> tuple[Int, Array]:
        scale = d * scales
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        q = np.clip(np.rint(x * inverse[..., None]), -32, 31)
        return q, squared_error(x, scale[..., None] * q)

    q, error = nearest(d, scales)
    for _ in range(2):
        dot = (scales * np.einsum("nbm,nbm->nb", q, x)).sum(1, dtype=np.float64)
        norm = (scales * scales * np.einsum("nbm,nbm->nb", q, q)).sum(1, dtype=np.float64)
        new_d = rounded_half((dot / np.where(norm > 0, norm, 1))[:, None].astype(np.float32))
        new_q, new_error = nearest(new_d, scales)
        is_better = (new_error.sum(1) < error.sum(1))[:, None]
        d, error = np.where(is_better, new_d, d), np.where(is_better, new_error, error)
        q = np.where(is_better[..., None], new_q, q)
        for up in (1, -1):
            try_scales = np.clip(scales + up, -128, 127)
            new_q, new_error = nearest(d, try_scales)
            is_better = new_error < error
            scales = np.where(is_better, try_scales, scales)
            np.copyto(error, new_error, where=is_better)
            np.copyto(q, new_q, where=is_better[..., None])
    quarters = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce(quarters >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    signed = scales.astype(np.int8).view(np.uint8)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), signed, half_bytes(d)], 1)


PACK: dict[str, Callable[[Array], Bytes]] = {
    "Q4_0": pack_q4_0,
    "Q8_0": pack_q8_0,
    "Q4_K": pack_q4_k,
    "Q5_K": pack_q5_k,
    "Q6_K": pack_q6_k,
}
