"""The quantisers, judged by their error: no more than the plain recipe's, and than what the step size allows."""

import numpy as np
import pytest

from receptance.errors import CheckpointError
from receptance.gguf.formats import BLOCK_FORMATS
from receptance.gguf.quantise import Array, dequantise, quantise, scaled

# Largest relative error (norm) for normally distributed numbers, rounded up: ggml's own recipes give 0.00536, 0.0859,
# 0.0713, 0.0361 and 0.0178 on the first of these matrices
LARGEST = {"Q8_0": 0.0050, "Q4_0": 0.0812, "Q4_K": 0.0703, "Q5_K": 0.0348, "Q6_K": 0.0170}

every_format = pytest.mark.parametrize("format", BLOCK_FORMATS)


def normal(rows: int = 64, columns: int = 1024, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * np.float32(0.02)


def error(x: Array, format: str) -> float:
    return float(np.linalg.norm(dequantise(quantise(x, format)) - x) / np.linalg.norm(x))


@every_format
def test_error_is_below_that_of_the_usual_recipe(format):
    assert error(normal(), format) <= LARGEST[format]


@every_format
def test_error_does_not_depend_on_the_size_of_the_numbers(format):
    for factor in (0.25, 1e3):  # far below, the float16 scales of the formats run out of digits
        assert error(normal() * np.float32(factor), format) <= LARGEST[format] * 1.01


@every_format
@pytest.mark.parametrize("draw", ["heavy tails", "one outlier", "all positive", "two values", "ramp"])
def test_a_row_of_any_kind_is_within_the_step_of_its_block(format, draw):
    rng = np.random.default_rng(1)
    x = {
        "heavy tails": rng.standard_t(2.5, (16, 512)),
        "one outlier": normal(16, 512) + 10.0 * (np.arange(512) == 77),
        "all positive": rng.uniform(1, 2, (16, 512)),
        "two values": rng.choice([-0.3, 0.7], (16, 512)),
        "ramp": np.linspace(-1, 1, 512) * np.ones((16, 1)),
    }[draw].astype(np.float32)
    found = dequantise(quantise(x, format))
    levels = {"Q8_0": 254, "Q4_0": 15, "Q4_K": 15, "Q5_K": 31, "Q6_K": 62}[format]
    width = {"Q6_K": 16}.get(format, 32)
    parts = x.reshape(16, -1, width)
    symmetric = 2 * np.abs(parts).max(-1)
    span = (
        symmetric if format in ("Q8_0", "Q4_0", "Q6_K") else np.maximum(parts.max(-1), 0) - np.minimum(parts.min(-1), 0)
    )
    # least squares may move a rounding by more than half a step, but on the whole block by no more than that
    difference = np.sqrt(((found - x) ** 2).reshape(16, -1, width).mean(-1))
    # super-blocks round each scale to a 64th (a 128th) of the largest one of eight (sixteen)
    of_super = np.abs(x).reshape(16, -1, 256).max(-1).repeat(256 // width, -1) if "K" in format else 0
    assert (difference <= 0.5 * span / levels + of_super / 63 + 1e-7).all()


@every_format
def test_zeros_and_constants_are_exact_or_nearly(format):
    assert not dequantise(quantise(np.zeros((2, 256), np.float32), format)).any()
    x = np.full((2, 256), -0.625, np.float32)
    assert np.allclose(dequantise(quantise(x, format)), x, rtol=2e-3)


@every_format
def test_quantising_again_loses_little(format):
    """Nothing where one scale is found again; Q5_K's scale and minimum are not always."""
    once = dequantise(quantise(normal(8, 512), format))
    assert error(once, format) <= (0.25 if format == "Q5_K" else 0.1) * LARGEST[format]


@every_format
def test_pieces_and_whole_are_the_same(format):
    x = normal(1100, 512, seed=4)  # more than one piece
    whole = quantise(x, format).data
    assert np.array_equal(whole[1000:], quantise(x[1000:], format).data)


@every_format
def test_powers_of_two_are_exact(format):
    blocks = quantise(normal(4, 512) + 0.01, format)
    assert np.array_equal(dequantise(scaled(blocks, 8.0)), 8 * dequantise(blocks))
    assert np.array_equal(
        dequantise(blocks), dequantise(quantise(normal(4, 512) + 0.01, format))
    )  # not changed in place


@every_format
def test_what_cannot_be_quantised_is_named(format):
    for bad in (np.nan, np.inf, 1e7):
        x = normal(1, 256)
        x[0, 3] = bad
        with pytest.raises(CheckpointError, match="cannot be quantised"):
            quantise(x, format)
    with pytest.raises(CheckpointError, match="no whole blocks"):
        quantise(normal(2, 48), format)


def test_the_package_gguf_reads_the_same_numbers():
    gguf = pytest.importorskip("gguf")
    for format in BLOCK_FORMATS:
        blocks = quantise(normal(8, 512), format)
        expected = gguf.quants.dequantize(blocks.data.reshape(8, -1), getattr(gguf.GGMLQuantizationType, format))
        assert np.array_equal(dequantise(blocks), expected)
