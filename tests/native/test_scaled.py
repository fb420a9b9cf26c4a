"""Weights with separate scales, through the C library: every type, scale type, group, zero point and
layout, on every path and instruction set, is the product with what ktransformers.quants.scaled dequantizes.

`threshold` chooses the path: 1 = panels for any number of tokens, 1000 = a decode kernel where there is one.
"""

from itertools import product

import numpy as np
import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.quants.scaled import SCALE_TYPES, SCALED_TYPES, ScaledWeight
from tests.native.quantized import quantized
from tests.native.scaled_blocks import KINDS, Kind, random_scaled
from tests.native.test_kernels import DECODE, ISAS, PREFILL, activations, relative, rng_for

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

TOKENS = (1, 2, 3, 4, 7, 8, 13, 64)


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_exact(False)
    native.set_panel_threshold(0)
    native.set_threads(None)
    native.set_isa(ISAS[-1])


def _kinds() -> dict[str, Kind]:
    """The published formats, and of each type every scale type, group and kind of zero points."""
    kinds = dict(KINDS)
    for name, type_ in SCALED_TYPES.items():
        for scale in SCALE_TYPES:
            kinds[f"{name}-{scale}"] = Kind(name, scale, 1, 32)
        for group in (16, 32, 64, 96, 128, 0):
            if group != 16 or name != "F8_E4M3":  # which meets no int8 GEMM
                kinds[f"{name}-{group or 'row'}"] = Kind(name, "F32", 1, group, global_scale=0.75)
        if type_.layout == "rows":
            kinds[f"{name}-128x128"] = Kind(name, "F32", 128, 128)
            kinds[f"{name}-tensor"] = Kind(name, "F32", 0, 0)
        if type_.zero:
            for group, bias in ((32, 0), (128, 1), (0, 0)):
                kinds[f"{name}-zeros-{group or 'row'}-{bias}"] = Kind(name, "F16", 1, group, True, bias)
            for zeros in (False, True):
                kinds[f"{name}-order-{int(zeros)}"] = Kind(name, "F32", 1, 32, zeros, 1, order=True)
    return kinds


ALL = _kinds()
EACH = pytest.mark.parametrize("name", ALL)


def shapes(kind: Kind) -> list[tuple[int, int]]:
    """Rows that end within a tile and within a block of scales, columns that end within a block and after a panel."""
    words = 8 if kind.type == "AWQ4" or (kind.type.startswith("GPTQ") and kind.zeros) else 1
    return [(words, 32), (40 if words == 8 else 37, 352), (152 if words == 8 else 149, 2080)]


def computed_from(weight: ScaledWeight, x: torch.Tensor) -> torch.Tensor:
    """The activations that the library multiplies, float64: quantized by the documented rule, but not for FP8 and not
    where neighbours have scales of their own."""
    if weight.type.name == "F8_E4M3" or weight.order is not None:
        return x.double()
    return quantized(x)


def bound(weight: ScaledWeight, values: torch.Tensor, x: torch.Tensor, isa: str) -> torch.Tensor:
    """2e-6 of the sum of the terms' magnitudes: what the order of fp32 additions may change. The largest value of a
    group of 32 columns stands for each, and twice where zero points are subtracted as sums: a weight may be smaller
    than its terms. FP8 meets bf16 activations where these have a GEMM."""
    largest = values.abs().view(len(values), -1, 32).amax(-1).repeat_interleave(32, -1)
    if weight.zeros is not None:
        largest = largest * 4
    rounding = 2**-8 if weight.type.name == "F8_E4M3" and ("bf16" in isa or "amx" in isa) else 2e-6
    return rounding * (x.double().abs() @ largest.T) + 1e-30


@EACH
def test_linear_equals_dequantized_weights(name):
    """kt_linear is x @ dequantized^T in float64: exact for the activations as they are quantized, within their
    rounding for the caller's, and portable C's result on every instruction set."""
    kind = ALL[name]
    for rows, cols in shapes(kind):
        rng = rng_for("scaled", name, rows, cols)
        weight = random_scaled(rng, kind, rows, cols)
        linear, values = native.Linear(weight), weight.dequantize().double()
        for tokens in TOKENS if cols < 1024 else (2, 13):
            x = activations(rng, tokens, cols, nasty=False)
            expected = computed_from(weight, x) @ values.T
            if rows > 16:  # enough results that none that happens to be near zero counts
                assert relative(expected, x.double() @ values.T) < 0.016
            for isa, threshold in product(ISAS, (DECODE, PREFILL)):
                native.set_isa(isa)
                native.set_panel_threshold(threshold)
                worst = ((linear(x).double() - expected).abs() / bound(weight, values, x, isa)).max().item()
                case = f"{name} [{rows}, {cols}] T={tokens} {isa} threshold={threshold}"
                assert worst <= 1.0, f"{case}: {worst:.2f} times the bound"


@pytest.mark.parametrize("name", KINDS)
def test_jobs_of_full_size(name):
    """A job has 128 rows only where there are many: all of 792 rows equal portable C's."""
    rng = rng_for("jobs", name)
    weight = random_scaled(rng, KINDS[name], 792, 512)
    linear, values = native.Linear(weight), weight.dequantize().double()
    native.set_threads(1)
    for tokens in (1, 2, 9):
        x = activations(rng, tokens, 512, nasty=False)
        native.set_isa("portable")
        expected = linear(x).double()
        assert relative(expected, computed_from(weight, x) @ values.T) < 1e-3  # a code may round to its neighbour
        for isa in ISAS[1:]:
            native.set_isa(isa)
            worst = ((linear(x).double() - expected).abs() / bound(weight, values, x, isa)).max().item()
            assert worst <= 1.0, f"{name} T={tokens} {isa}: {worst:.2f} times the bound"


@pytest.mark.parametrize("name", KINDS)
def test_decode_of_several_tokens_is_decode_of_each(name):
    """A decode kernel meets several tokens at once; each gets the bits that it gets alone."""
    rng = rng_for("several", name)
    linear = native.Linear(random_scaled(rng, KINDS[name], 24, 352))
    native.set_panel_threshold(DECODE)
    for isa in ISAS:
        native.set_isa(isa)
        x = activations(rng, 8, 352, nasty=False)
        alone = torch.cat([linear(row[None]) for row in x])
        for tokens in range(2, 8):
            assert torch.equal(linear(x[:tokens]), alone[:tokens]), f"{name} T={tokens} {isa}"


@EACH
def test_dequantize_equals_torch(name):
    """kt_dequantize gives the numbers of ScaledWeight.dequantize, up to the rounding of one product."""
    kind = ALL[name]
    for rows, cols in shapes(kind):
        weight = random_scaled(rng_for("numbers", name, rows, cols), kind, rows, cols)
        expected = weight.dequantize()
        atol = (expected.abs().amax() * 4e-7).item() if kind.zeros else 0.0  # s*u - s*z rounds twice
        for isa in ISAS:
            native.set_isa(isa)
            torch.testing.assert_close(native.dequantize(weight), expected, rtol=3e-7, atol=atol)


@EACH
def test_exact_mode(name):
    """With set_exact no activation is rounded: 1e-5 of the float64 product."""
    kind = ALL[name]
    rng = rng_for("exact", name)
    weight = random_scaled(rng, kind, 40, 352)
    linear, values = native.Linear(weight), weight.dequantize().double()
    native.set_exact(True)
    for isa, tokens in product(ISAS, TOKENS):
        native.set_isa(isa)
        x = activations(rng, tokens, 352, nasty=False)
        for dtype in (torch.float32, torch.bfloat16):
            found = linear(x.to(dtype))
            error = relative(found, x.to(dtype).double() @ values.T)
            assert error < (1e-5 if dtype == torch.float32 else 4e-3), f"{name} {isa} T={tokens} {dtype}: {error:.3g}"


@EACH
def test_bf16_activations(name):
    """bf16 in, bf16 out: within the rounding of the result."""
    kind = ALL[name]
    rng = rng_for("bf16", name)
    weight = random_scaled(rng, kind, 40, 352)
    linear, values = native.Linear(weight), weight.dequantize().double()
    for isa, tokens in product(ISAS, TOKENS):
        native.set_isa(isa)
        x = activations(rng, tokens, 352, nasty=False).bfloat16()
        error = relative(linear(x), computed_from(weight, x.float()) @ values.T)
        assert error < 4e-3, f"{name} {isa} T={tokens}: {error:.3g}"


def _wider(part: torch.Tensor | None, rng: np.random.Generator, lines: int, before: int, after: int):
    """The same bytes within lines that are longer, every `lines`-th of a larger array."""
    if part is None:
        return None
    room = rng.integers(0, 256, (len(part) * lines, before + part.shape[1] + after), dtype=np.uint8)
    room[::lines, before : before + part.shape[1]] = part.numpy()
    return torch.from_numpy(room)[::lines, before : before + part.shape[1]]


@pytest.mark.parametrize("name", KINDS)
def test_views_of_larger_arrays(name):
    """Every part may lie in longer lines, at odd addresses, with other matrices' lines between: as in stacked experts,
    fused projections and slices of rows."""
    for rows, cols in shapes(KINDS[name])[1:]:
        rng = rng_for("views", name, rows)
        dense = random_scaled(rng, name, rows, cols)
        parts = {part: _wider(getattr(dense, part), rng, 2, 3, 5) for part in ("data", "scales", "zeros")}
        view = ScaledWeight(
            dense.type, dense.shape, scale_type=dense.scale_type, scale_rows=dense.scale_rows,
            scale_cols=dense.scale_cols, zero_bias=dense.zero_bias, order=dense.order,
            global_scale=dense.global_scale, **parts,
        )  # fmt: skip
        x = activations(rng, 13, cols, nasty=False)
        for isa, tokens in product(ISAS, (1, 13)):
            native.set_isa(isa)
            assert torch.equal(native.Linear(view)(x[:tokens]), native.Linear(dense)(x[:tokens])), f"{name} {isa}"


@pytest.mark.parametrize("name", sorted(set(SCALED_TYPES) - {"F8_E4M3"}))
def test_extreme_codes(name):
    """All-lowest and all-highest codes against full-scale activations neither saturate nor wrap."""
    kind = Kind(name, "F32", 1, 32)
    for code in (0x00, 0x7F, 0x80, 0xF7, 0xFF):
        weight = random_scaled(rng_for(), kind, 40, 96)
        weight.data.fill_(code)
        weight.scales.view(torch.float32).fill_(1.0)
        for sign in (1.0, -1.0):
            x = torch.full((7, 96), 127.0 * sign)
            expected = x.double() @ weight.dequantize().double().T
            for isa, threshold in product(ISAS, (DECODE, PREFILL)):
                native.set_isa(isa)
                native.set_panel_threshold(threshold)
                found = native.Linear(weight)(x).double()
                assert torch.allclose(found, expected, rtol=1e-6, atol=1e-3), f"{name} {code:#x} {isa} {threshold}"


def test_columns_that_name_more_groups_than_c_has_room_for():
    """1024 scattered groups compute; one more is refused."""
    kind = Kind("GPTQ4", "F32", 1, 32, order=True)
    most, more = (random_scaled(rng_for(), kind, 8, 32 * groups) for groups in (1024, 1025))
    x = activations(rng_for(), 1, 32 * 1024, nasty=False)
    assert relative(native.Linear(most)(x), x.double() @ most.dequantize().double().T) < 1e-5
    with pytest.raises(NativeError, match="column order"):
        native.Linear(more)(torch.ones(1, 32 * 1025))
