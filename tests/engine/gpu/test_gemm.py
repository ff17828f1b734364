"""Products of dozens to hundreds of rows against float64, and in a step of the model."""

import pytest
import torch
from tests.engine.gpu.test_model import DEVICE, check_decoding, error, make, older

from receptance.engine.gpu import gemm
from receptance.engine.gpu.choices import GEMM, MIXED, Choice
from receptance.engine.gpu.gemv import ADD, GATED, LOGITS, NONE, RELU_SQUARE, SIGMOID, TANH, WRITE
from receptance.engine.gpu.model import GpuModel
from receptance.engine.gpu.products import Piece

pytestmark = pytest.mark.usefixtures("kernels")
ROUNDING = 2.0**-11  # of float16


@pytest.fixture(scope="module")
def model():
    return make()


def numbers(*shape: int, seed: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x / shape[-1] ** 0.5).half().to(DEVICE)


def of(fast: GpuModel, shape: gemm.Shape | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast.products.has_gemm:
        pytest.skip("needs compute capability 9.0")
    if shape is not None:
        if shape.split > 1 and DEVICE == "cpu":
            pytest.skip("the emulation has no clusters")
        monkeypatch.setattr(gemm, "shape", lambda *_: shape)


SHAPES = [
    (gemm.Shape(groups, batch, depth, split), rows)
    for groups, batch, depth, split, rows in [
        (1, 16, 9, 1, 11), (2, 16, 5, 1, 16), (1, 32, 8, 1, 32), (2, 32, 4, 8, 17), (1, 64, 6, 1, 50),
        (2, 64, 4, 1, 64), (2, 64, 4, 4, 64), (2, 128, 6, 1, 100), (2, 128, 6, 2, 128),
        (2, 256, 4, 1, 300), (2, 256, 4, 4, 256), (1, 64, 3, 8, 130),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_pieces_of_all_sizes(model, shape, rows, monkeypatch):
    """Three inputs and two outputs, sums of 96 to 544 columns, 32 to 160 rows of weights, what nothing writes stays."""
    fast = GpuModel(model, slots=1, most_rows=8)
    of(fast, shape, monkeypatch)
    sizes = [(160, 544, NONE), (32, 96, TANH), (96, 320, SIGMOID), (128, 64, RELU_SQUARE)]
    weights = [numbers(n, k, seed=i) for i, (n, k, _) in enumerate(sizes)]
    width = 544 + 96 + 320 + 64
    x = numbers(rows, width, seed=9) * 4
    out = torch.full((2, rows, 320), torch.nan, dtype=torch.float16, device=DEVICE)
    pieces, weight, column, expected = [], 0, 0, []
    for i, ((n, k, activation), w) in enumerate(zip(sizes, weights)):
        at = (i // 2) * rows * 320 + (i % 2) * 160
        pieces.append(Piece(n, k, weight, column, at, 320, activation))
        product = x[:, column : column + k].double() @ w.double().T
        made = {NONE: product, TANH: product.tanh(), SIGMOID: product.sigmoid(), RELU_SQUARE: product.relu() ** 2}
        expected.append((i // 2, (i % 2) * 160, made[activation]))
        weight, column = weight + n * k, column + k
    fast.products.many(torch.cat([w.flatten() for w in weights]), x, out, WRITE, pieces=tuple(pieces))
    for half, first, y in expected:
        got = out[half, :, first : first + y.shape[1]].double()
        assert float((got - y).abs().max()) < 2 * ROUNDING * float(y.abs().max())
        out[half, :, first : first + y.shape[1]] = torch.nan
    assert out.isnan().all()


@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_ways_to_leave_a_product(model, shape, rows, monkeypatch):
    fast = GpuModel(model, slots=1, most_rows=8)
    of(fast, shape, monkeypatch)
    weight, x, gate = numbers(192, 448, seed=0), numbers(rows, 448, seed=1) * 4, numbers(rows, 192, seed=2)
    before = torch.randn(rows, 192, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    product = x.double() @ weight.double().T
    for mode, expected in (LOGITS, product), (ADD, before + product), (GATED, before + gate.double() * product):
        out = before.clone()
        fast.products.many(weight, x, out, mode, gate=gate if mode == GATED else None)
        assert error(out, expected) < 1e-6
        again = before.clone()
        fast.products.many(weight, x, again, mode, gate=gate if mode == GATED else None)
        assert torch.equal(out, again)


@pytest.mark.parametrize(("products", "few"), [(GEMM, True), (GEMM, False), (MIXED, False)])
@pytest.mark.parametrize("version", ["7", "6", "5.0", "5.2", "4"])
def test_steps_of_the_models(version, products, few, monkeypatch):
    monkeypatch.setattr(GpuModel, "choice", lambda *_: Choice(products, few))
    model = make(heads=3, layers=3) if version == "7" else older(version, heads=3)
    of(GpuModel(model, slots=1, most_rows=8), None, monkeypatch)
    check_decoding(model, 9)


def test_other_types_of_weights_and_states(monkeypatch):
    monkeypatch.setattr(GpuModel, "choice", lambda *_: Choice(GEMM, False))
    of(GpuModel(make(), slots=1, most_rows=8), None, monkeypatch)
    check_decoding(make(128), 20, bound=8e-3, state_dtype=torch.float16)
    check_decoding(make(32), 5, bound=5e-2, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 16, 64, 100, 256, 1024])
def test_blocks_of_every_cut_fit_on_a_multiprocessor(rows):
    for pieces in ((Piece(2048, 8192, 0, 0, 0, 2048),), (Piece(65536, 2048, 0, 0, 0, 65536),)):
        shape = gemm.shape(pieces, rows, 132)
        assert shape.shared <= 227 * 1024
        assert shape.depth >= 3
        assert shape.batch * shape.rows % (8 * shape.split) == 0
