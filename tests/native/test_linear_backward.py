"""native.Linear.backward: d_x = d_y @ W of every format, on every instruction set, with any number of threads."""

import numpy as np
import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from tests.native.blocks import FORMATS, random_weight, values
from tests.native.scaled_blocks import KINDS, random_scaled

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

ISAS = native.isas() if native.available() else []
FLOATS = ("F32", "F16", "BF16")
BF16_ISAS = ("bf16", "amx", "i8mm")


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_exact(False)
    native.set_threads(None)
    native.set_isa(ISAS[-1])


def case(name: str, rows: int, cols: int):
    """A packed matrix and its values in float64."""
    rng = np.random.default_rng(rows + cols)
    if name in KINDS:
        weight = random_scaled(rng, name, rows, cols)
        return weight, weight.dequantize().double()
    weight = random_weight(rng, name, rows, cols)
    return weight, values(weight)


def shapes(name: str) -> list[tuple[int, int]]:
    """Rows that end within a tile, an odd number where the format has such, more than a panel; columns that end within
    a tile, where the format has such, within a block of columns, and after several."""
    if name in FLOATS:
        return [(1, 1), (7, 21), (531, 273), (1061, 96)]
    block = FORMATS[name][0] if name in FORMATS else 32
    words = 8 if name in KINDS else 1
    return [(words, block), (37 // words * words, 3 * block), (1061 // words * words, 512 + block)]


def worst(found: torch.Tensor, d_y: torch.Tensor, weight: torch.Tensor) -> float:
    """The largest error, of the sum of magnitudes that was added."""
    return ((found.double() - d_y.double() @ weight).abs() / (d_y.double().abs() @ weight.abs() + 1e-30)).max().item()


@pytest.mark.parametrize("name", [*FORMATS, *KINDS])
def test_exact(name):
    """In fp32: what the order of additions changes, and no more, on every instruction set."""
    native.set_exact(True)
    for rows, cols in shapes(name):
        weight, truth = case(name, rows, cols)
        linear = native.Linear(weight)
        for tokens in (1, 7, 300):
            d_y = torch.randn(tokens, rows)
            for isa in ISAS:
                native.set_isa(isa)
                found = linear.backward(d_y)
                assert worst(found, d_y, truth) < 1e-6, f"{rows}x{cols} T={tokens} {isa}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FORMATS, *KINDS])
def test_numerics(name, dtype):
    """Where there is a bf16 multiplier, rounding to bf16 (2^-8 of each factor) where the header says so."""
    for rows, cols in shapes(name)[1:]:
        weight, truth = case(name, rows, cols)
        linear = native.Linear(weight)
        d_y = torch.randn(70, rows).to(dtype)
        rounded = name not in ("F32", "F16") and (name != "BF16" or dtype == torch.bfloat16)
        result = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        for isa in ISAS:
            native.set_isa(isa)
            by_bf16 = rounded and any(part in isa for part in BF16_ISAS)
            error = worst(linear.backward(d_y), d_y, truth)
            assert error < 1e-6 + result + by_bf16 * 2**-7, f"{rows}x{cols} {isa}"


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "BF16", "FP8", "GPTQ_ORDER"])
def test_threads_and_tokens_change_no_bit(name):
    weight, _ = case(name, 328, 1024)
    linear = native.Linear(weight)
    d_y = torch.randn(530, 328)
    for isa in ISAS:
        native.set_isa(isa)
        native.set_threads(1)
        alone = linear.backward(d_y)
        for threads in (2, 3, 8):
            native.set_threads(threads)
            assert torch.equal(linear.backward(d_y), alone), f"{isa} {threads}"
        assert torch.equal(linear.backward(d_y[255:263]), alone[255:263]), isa


def test_a_gradient_without_end_stays_in_its_row():
    weight, _ = case("Q4_K", 37, 512)
    linear = native.Linear(weight)
    d_y = torch.randn(9, 37)
    alone = linear.backward(d_y)
    d_y[3, 5], d_y[7, 0] = float("inf"), float("nan")
    found = linear.backward(d_y)
    kept = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(found[kept], alone[kept])
    assert not found[3].isfinite().any()
    assert found[7].isnan().all()


def test_shapes():
    weight, truth = case("Q8_0", 40, 64)
    linear = native.Linear(weight)
    d_y = torch.randn(2, 3, 40)
    assert torch.allclose(linear.backward(d_y).double(), d_y.double() @ truth, atol=1e-2)
    assert linear.backward(torch.empty(0, 40)).shape == (0, 64)
    with pytest.raises(NativeError, match="41.*40"):
        linear.backward(torch.randn(2, 41))
