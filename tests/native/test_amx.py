"""The AMX GEMMs, with tile instructions computed in C where the processor lacks them: every format against portable C,
and one order of sums for few and many tokens. On a processor with AMX, its results are also those of the emulation."""

import pytest
import torch

from ktransformers import native
from tests.native.blocks import FORMATS, random_weight
from tests.native.scaled_blocks import KINDS, random_scaled
from tests.native.test_kernels import PREFILL, QUANTIZED, activations, assert_equal_up_to_summation, relative, rng_for

ISAS = [name for name in native.isas() if name.startswith("amx")] if native.available() else []
pytestmark = pytest.mark.skipif(not ISAS, reason="the C library is not built, or the processor has no AVX-512")


@pytest.fixture(autouse=True)
def _restore():
    native.set_panel_threshold(PREFILL)
    yield
    native.set_panel_threshold(0)
    native.set_isa(native.isas()[-1])


def test_emulation_is_never_chosen():
    """The best instruction set, which is also the one in use from the start, is the processor's own."""
    assert native.isas()[-1] != "amx_emulated"


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q2_K", "Q6_K", "Q8_0", "NVFP4", "BF16"])
def test_every_number_of_tokens(name):
    """1 to 40 tokens: tiles of every height, one and two of them, of an odd number of rows, beyond one slice."""
    rng = rng_for("amx", name)
    rows, cols = 83, 768 if name in QUANTIZED else 333
    weight = random_weight(rng, name, rows, cols)
    linear, x = native.Linear(weight), activations(rng, 40, cols, nasty=False)
    for dtype in (torch.float32, torch.bfloat16):
        native.set_isa("portable")
        truth = linear(x.to(dtype).float())
        for isa in ISAS:
            native.set_isa(isa)
            for tokens in range(1, 41):
                found, case = linear(x[:tokens].to(dtype)), f"{name} {dtype} T={tokens} {isa}"
                if dtype == torch.float32:
                    assert_equal_up_to_summation(found, truth[:tokens], weight, x[:tokens], case)
                assert relative(found, truth[:tokens]) < (1e-6 if dtype == torch.float32 else 3e-3), case


@pytest.mark.parametrize("name", KINDS)
def test_separate_scales(name):
    """Every published type, FP8 among them, whose scales the bf16 GEMM applies to sums of tiles."""
    rng = rng_for("amx", name)
    linear, x = native.Linear(random_scaled(rng, name, 80, 1152)), activations(rng, 40, 1152, nasty=False)
    for tokens in (3, 8, 13, 32, 40):
        native.set_isa("portable")
        expected = linear(x[:tokens].bfloat16().float())
        for isa in ISAS:
            native.set_isa(isa)
            error = relative(linear(x[:tokens].bfloat16().float()), expected)
            assert error < 1e-6, f"{name} T={tokens} {isa}: {error:.3g}"


@pytest.mark.parametrize("name", QUANTIZED)
def test_int8_tiles_equal_avx512(name):
    """Few tokens go by the GEMM of AVX-512, many by tiles: bit for bit the same."""
    rng = rng_for("amx bits", name)
    linear = native.Linear(random_weight(rng, name, 83, 1280))
    for tokens in (1, 2, 5, 8, 12, 15, 17, 33):
        x = activations(rng, tokens, 1280, nasty=True)
        native.set_isa("avx512")
        expected = linear(x)
        for isa in ISAS:
            native.set_isa(isa)
            assert torch.equal(linear(x), expected), f"{name} T={tokens} {isa}"


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_the_others(name):
    """The same bits in a call of few tokens and among 37."""
    rng = rng_for("amx alone", name)
    cols = 1280 if name in QUANTIZED else 1283
    linear = native.Linear(random_weight(rng, name, 49, cols))
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(rng, 37, cols, nasty=False).to(dtype)
        for isa in ISAS:
            native.set_isa(isa)
            together = linear(x)
            for tokens in (1, 7, 9):
                assert torch.equal(linear(x[:tokens]), together[:tokens]), f"{name} {dtype} T={tokens} {isa}"


@pytest.mark.skipif("amx" not in ISAS, reason="the processor has no AMX")
@pytest.mark.parametrize("name", FORMATS)
def test_emulation_is_the_processor(name):
    """Instructions and their emulation give the same bits."""
    rng = rng_for("amx twice", name)
    cols = 1280 if name in QUANTIZED else 1283
    linear = native.Linear(random_weight(rng, name, 83, cols))
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(rng, 37, cols, nasty=True).to(dtype)
        native.set_isa("amx_emulated")
        expected = linear(x)
        native.set_isa("amx")
        assert torch.equal(linear(x), expected), f"{name} {dtype}"
