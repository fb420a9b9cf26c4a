"""The C encoder: against the torch one (quants/encode.py) and the gguf package, on every instruction set, with any number
of threads, with importances, and with what cannot be encoded."""

import gguf
import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError, UnsupportedError, WeightError
from ktransformers.native import encode
from ktransformers.quants.blocks import QUANT_TYPES, dequantize
from ktransformers.quants.encode import quantize

if not native.available():
    pytest.skip(native.NOT_BUILT, allow_module_level=True)

PLAIN = ["F32", "F16", "BF16"]
PACKED = ["Q8_0", "Q4_0", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SEARCHED = PACKED[1:]
IN_TORCH = ["Q8_0", "Q4_K", "Q5_K", "Q6_K"]


@pytest.fixture(autouse=True)
def settings():
    """The instruction set and the threads of before."""
    isa = native.isa()
    yield
    native.set_isa(isa)
    native.set_threads(None)


def samples(rows=32, columns=512):
    """Weights of every kind, by name."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=draw)
    uniform = torch.rand(rows, columns, generator=draw)
    sparse = normal * (uniform > 0.98)
    return {
        "normal": normal * 0.02, "laplace": -normal.sign() * uniform.log() * 0.02, "uniform": uniform - 0.5,
        "outlier": normal * (1 + 30 * (uniform > 0.995)), "shifted": normal + 1, "positive": uniform,
        "heavy": normal / (uniform + 1e-3), "sparse": sparse, "tiny": normal * 1e-5, "huge": normal * 1e4,
        "zero": torch.zeros(rows, columns), "mixed": normal * 10 ** (6 * uniform[:, :1] - 3),
        "constant": torch.linspace(-2, 2, rows)[:, None].expand(rows, columns).contiguous(),
    }  # fmt: skip


def error(x, packed, kind, weights=None):
    """Root of the mean square of what is lost, relative to the weights."""
    weights = torch.ones(x.shape[-1]) if weights is None else weights
    lost = ((dequantize(packed, kind, tuple(x.shape)) - x).double().square() * weights).sum().sqrt()
    return float(lost / (x.double().square() * weights).sum().sqrt().clamp(min=1e-30))


def test_the_types():
    """What C writes is what these tests cover."""
    assert set(native.encoded_types()) == {*PLAIN, *PACKED}


@pytest.mark.parametrize("kind", IN_TORCH)
@pytest.mark.parametrize("name", samples())
def test_no_worse_than_torch(kind, name):
    """The error is at most that of the torch encoder, which tries every start in turn: up to 1 % for the few groups where
    starts differ, and up to the rounding of an fp16 scale where nothing else is lost."""
    x = samples()[name]
    ours, theirs = error(x, encode(x, kind), kind), error(x, quantize(x, kind), kind)
    assert ours <= max(theirs * (1.08 if name == "sparse" else 1.01), 3e-4), (ours, theirs)


def test_the_mean_error_is_below_torchs():
    """On normally distributed weights, which most are."""
    x = samples(64, 2048)["normal"]
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        assert error(x, encode(x, kind), kind) < 1.001 * error(x, quantize(x, kind), kind), kind


def test_q8_0_is_the_gguf_packages():
    x = torch.cat(list(samples().values()))
    x[0, ::2], x[0, 1::2] = 127 * 0.25, 0.125  # ties
    x[1], x[2] = -x[0], x[3] * 1e-9
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(encode(x, "Q8_0"), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", samples())
def test_q4_0_is_better_than_the_gguf_packages(name):
    x = samples()[name]
    theirs = torch.from_numpy(gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q4_0))
    assert error(x, encode(x, "Q4_0"), "Q4_0") <= 1.01 * error(x, theirs, "Q4_0") + 2e-4


def test_more_bits_lose_less():
    x = samples()["normal"]
    kinds = ["Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    errors = [error(x, encode(x, kind), kind) for kind in kinds]
    assert errors == sorted(errors, reverse=True)
    bounds = {"Q2_K": 0.27, "Q3_K": 0.15, "Q4_0": 0.083, "Q4_K": 0.071, "Q5_K": 0.035, "Q6_K": 0.0172, "Q8_0": 0.006}
    assert all(e < bounds[k] for k, e in zip(kinds, errors, strict=True)), errors
    assert all(error(x, encode(x, kind), kind) < 0.076 for kind in ("IQ4_NL", "IQ4_XS"))


@pytest.mark.parametrize("kind", PACKED)
def test_the_gguf_package_reads_them(kind):
    x = torch.cat(list(samples().values()))
    packed = encode(x, kind)
    theirs = torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(dequantize(packed, kind, tuple(x.shape)), theirs)
    assert bool(theirs.isfinite().all())


@pytest.mark.parametrize("kind", [*PLAIN, *PACKED])
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_every_isa_and_number_of_threads(kind, rows):
    """The same bytes everywhere, with and without importances, however rows and blocks meet the vectors; several jobs."""
    draw = torch.Generator().manual_seed(1)
    columns = 3 * 256 if rows < 37 else 5 * 256
    x = torch.randn(rows, columns, generator=draw) * 10 ** (4 * torch.rand(rows, 1, generator=draw) - 2)
    for importance in (None, torch.rand(columns, generator=draw)):
        native.set_isa("portable")
        native.set_threads(1)
        truth = encode(x, kind, importance)
        for isa in native.isas():
            for threads in (1, 2, 3):
                native.set_isa(isa)
                native.set_threads(threads)
                assert torch.equal(encode(x, kind, importance), truth), (isa, threads, importance is None)
        one = torch.cat([encode(row, kind, importance) for row in x])
        assert torch.equal(one, truth.view(-1))  # a row alone is a row among others


@pytest.mark.parametrize("kind", [*PLAIN, *PACKED])
def test_dtypes_and_layouts(kind):
    """bf16 and fp16 weights are read as they are; strides, dimensions and double do not matter."""
    x = samples(4)["normal"]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(encode(x.to(dtype), kind), encode(x.to(dtype).float(), kind))
    assert torch.equal(encode(x.double(), kind), encode(x, kind))
    assert torch.equal(encode(x.t().contiguous().t(), kind), encode(x, kind))
    assert torch.equal(encode(x.view(2, 2, 512), kind), encode(x, kind).view(2, 2, -1))
    assert encode(x[:0], kind).shape == (0, QUANT_TYPES[kind].row_bytes(512))


def test_bf16_rounds_alike_everywhere():
    """Subnormal numbers among others, halfway cases and the largest, in vectors and behind the last of them."""
    halfway = torch.arange(0x3F7F8000, 0x3F838000, 0x4000, dtype=torch.int32).view(torch.float32)
    odd = torch.tensor([0.0, -0.0, 1e-38, -1e-40, 1e-45, 2.0**-126, -(2.0**-126) * 0.999, 3.38e38, -3.38e38, 1 / 3])
    for columns in (7, 32, 33, 100):
        x = torch.cat([odd, halfway, -halfway]).repeat(40)[: 8 * columns].view(8, columns)
        x = torch.cat([x, torch.linspace(-1, 1, columns).expand(2, columns)])
        for isa in native.isas():
            native.set_isa(isa)
            assert encode(x, "BF16").view(torch.bfloat16).view(torch.int16).equal(x.bfloat16().view(torch.int16)), isa


def test_plain_types_round_as_torch_does():
    x = torch.cat([samples(4)["normal"], torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e-42] * 128])])
    for kind in PLAIN:
        dtype = QUANT_TYPES[kind].torch_dtype
        assert encode(x, kind).view(dtype).equal(x.to(dtype)) or torch.allclose(
            encode(x, kind).view(dtype).float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("kind", SEARCHED)
def test_importances_reduce_the_error_they_weigh(kind):
    """Errors of important columns fall, and the weighted sum does; alike for all is as none at all."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(64, 1024, generator=draw)
    weights = 10 ** (4 * torch.rand(1024, generator=draw))
    weighted, plain = encode(x, kind, weights), encode(x, kind)
    assert error(x, weighted, kind, weights) < 0.97 * error(x, plain, kind, weights)
    assert torch.equal(encode(x, kind, torch.full((1024,), 7.0)), plain)
    assert torch.equal(encode(x, kind, torch.zeros(1024)), plain)
    assert torch.equal(encode(x, kind, 8 * weights), weighted)
    nothing = torch.zeros(1024)
    nothing[::3] = 1.0
    assert bool(dequantize(encode(x, kind, nothing), kind, (64, 1024)).isfinite().all())


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, 1e-30, -1e-6, 1000.0])
def test_constant_blocks(kind, fill):
    x = torch.full((3, 256), fill)
    back = dequantize(encode(x, kind), kind, (3, 256))
    assert bool(back.isfinite().all()) and torch.allclose(back, x, rtol=0.02, atol=6e-6)


def test_what_cannot_be_encoded():
    """One error each; NaN before numbers too large, wherever they are, so that threads do not show."""
    x = torch.randn(300, 512)
    for kind in PACKED:
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken = x.clone()
            broken[299, 511], broken[0, 0] = bad, 1e30
            with pytest.raises(WeightError, match=f"{kind}.*NaN"):
                encode(broken, kind)
        with pytest.raises(WeightError, match=f"{kind}.*too large"):
            encode(x * 1e30, kind)
    for kind, scale in (("F16", 1e6), ("BF16", 3.4e38)):
        with pytest.raises(WeightError, match=f"{kind}.*too large"):
            encode(torch.ones(2, 2) * scale, kind)
    with pytest.raises(UnsupportedError, match="IQ2_XXS.*Q4_K"):
        encode(x, "IQ2_XXS")
    with pytest.raises(WeightError, match="256"):
        encode(torch.ones(2, 100), "Q4_K")
    with pytest.raises(NativeError, match="expected floats"):
        encode(torch.ones(2, 256, dtype=torch.int32), "Q4_K")
    with pytest.raises(NativeError, match=r"importance.*\[512\]"):
        encode(x, "Q4_K", torch.ones(256))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(WeightError, match="importance"):
            encode(x, "Q4_K", torch.full((512,), bad))
