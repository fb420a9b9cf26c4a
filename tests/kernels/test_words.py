"""Words against quants' own numbers: every type, sizes off the padding, extreme bytes, slices, and the planner's bytes."""

import pytest
import torch

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.kernels import layouts
from ktransformers.kernels import words as w
from ktransformers.kernels.floats import Floats, Loss
from ktransformers.quants.blocks import QUANT_TYPES, Packed
from tests.kernels.weights import GGUF, SCALED, random_weight


def assert_same(words, weight):
    """Equal, zeros of either sign alike."""
    ours, theirs = w.dequantize(words), weight.dequantize()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert bool(same.all()), f"{weight.type}: {int((~same).sum())} of {same.numel()} differ"


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
@pytest.mark.parametrize("rows, cols", [(24, 512), (16, 256), (40, 1280)])
def test_the_numbers_are_those_of_quants(name, rows, cols):
    weight = random_weight(name, rows, cols)
    assert_same(w.from_packed(weight, "cpu"), weight)


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("byte", [0x00, 0x33, 0x7B, 0x80, 0xCC, 0xFF])
def test_extreme_blocks(name, byte):
    kind = QUANT_TYPES[name]
    data = torch.full((3 * kind.packed_bytes((256,)),), byte, dtype=torch.uint8)
    weight = Packed(data, kind, (3, 256))
    assert_same(w.from_packed(weight, "cpu"), weight)


@pytest.mark.parametrize("name", GGUF)
def test_nasty_blocks(name):
    weight = random_weight(name, 33, 256, seed=3, nasty=True)
    assert_same(w.from_packed(weight, "cpu"), weight)


@pytest.mark.parametrize("name", ["Q3_K", "Q8_0", "GPTQ_ASYM", "AWQ"])
def test_a_weight_of_many_pieces(name, monkeypatch):
    """Rows are taken a few at a time: the seams are where they should be."""
    monkeypatch.setattr(w, "WEIGHTS_AT_ONCE", 512 * 40)
    weight = random_weight(name, 104, 512)
    assert_same(w.from_packed(weight, "cpu"), weight)


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
def test_bytes_are_known_beforehand(name):
    weight = random_weight(name, 24, 512)
    words = w.from_packed(weight, "cpu")
    assert words.nbytes == layouts.words_bytes(layouts.layout_of(weight), (24, 512))
    if name in QUANT_TYPES:
        assert words.nbytes == layouts.words_bytes(name, (24, 512)) == layouts.words_bytes(QUANT_TYPES[name], (24, 512))


@pytest.mark.parametrize("name, bits", [("Q4_0", 4.5), ("Q8_0", 8.5), ("Q2_K", 2.625), ("Q3_K", 3.5625), ("Q4_K", 4.625),
                                        ("Q5_K", 5.625), ("Q6_K", 6.5625), ("IQ4_XS", 4.3125), ("MXFP4", 4.25)])  # fmt: skip
def test_bits_a_weight(name, bits):
    assert layouts.words_bytes(name, (8, 512, 1024)) * 8 == bits * 8 * 512 * 1024


def test_experts():
    each = [random_weight("Q4_K", 24, 256, seed) for seed in range(3)]
    words = w.from_experts(each, "cpu")
    assert words.shape == (3, 24, 256) and words.nbytes == layouts.words_bytes("Q4_K", (3, 24, 256))
    for e, weight in enumerate(each):
        assert_same(words.expert(e), weight)
    joined = Packed(torch.cat([weight.data for weight in each]), each[0].type, (3, 24, 256))
    assert torch.equal(w.dequantize(w.from_packed(joined, "cpu")), w.dequantize(words))


def test_gate_and_up_in_one_weight_and_an_expert_replaced():
    gate, up, other = (random_weight("Q6_K", 32, 256, seed) for seed in range(3))
    words = w.empty(layouts.layout_of(gate), (2, 64, 256), "cpu")
    for e in range(2):
        w.write(words.expert(e), gate)
        w.write(words.expert(e), up, row=32)
    assert torch.equal(w.dequantize(words.expert(1)), torch.cat([gate.dequantize(), up.dequantize()]))
    w.write(words.expert(1), other, row=32)
    assert torch.equal(w.dequantize(words.expert(1))[32:], other.dequantize())
    assert torch.equal(w.dequantize(words.expert(0))[32:], up.dequantize())


def test_what_has_no_words_is_refused():
    with pytest.raises(UnsupportedError, match="IQ2_XS have no packed form"):
        w.from_packed(random_weight("IQ2_XS", 16, 256), "cpu")
    with pytest.raises(UnsupportedError, match="I8 in groups of 32 with scales of E8M0 has no packed form"):
        layouts.scaled_layout("I8", 256, 32, "E8M0")
    with pytest.raises(WeightError, match="48 columns.*multiple of 32"):
        w.from_packed(random_weight("INT8_GROUP", 16, 48), "cpu")
    uneven = random_weight("GPTQ_ORDER", 16, 256)
    uneven.order[:] = 0
    with pytest.raises(UnsupportedError, match="different numbers of columns"):
        w.from_packed(uneven, "cpu")
    words = w.from_packed(random_weight("Q4_0", 16, 64), "cpu")
    with pytest.raises(WeightError, match="Cannot write Q"):
        w.write(words, random_weight("Q8_0", 16, 64))
    with pytest.raises(WeightError, match="expected torch.float16"):
        w.Words(words.layout, words.shape, words.planes, words.scales.float())


@pytest.mark.parametrize("bits, worst", [(4, 0.12), (8, 0.007)])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_quantized_at_load(bits, worst, group):
    """Half a step at most is lost, and what rounding the scale to bf16 takes from the widest weight."""
    weight = torch.randn(40, 512, generator=torch.Generator().manual_seed(4)).bfloat16()
    weight[5] = 0
    floats = Floats(weight, weight.dtype, bits, group)
    words, error = w.from_packed(floats, "cpu"), floats.loss.share
    back = w.dequantize(words)
    step = words.scales[:, :40].T.float().repeat_interleave(512 // len(words.scales), 1)
    assert bool(((back - weight.float()).abs() <= (0.5 + 2 ** (bits - 1) * 2**-8) * step).all())
    assert error == pytest.approx(float((back - weight.float()).norm() / weight.float().norm()), rel=1e-4)
    assert error < worst * (1.6 if group == -1 else 1)
    assert words.nbytes == layouts.words_bytes(words.layout, (40, 512))


def test_what_is_published_is_quantized_as_what_is_in_memory(monkeypatch):
    """Of any type, in pieces; experts, gate and up one below the other, share one sum of what is lost."""
    fp8 = random_weight("FP8", 256, 512)
    weight, loss = fp8.dequantize(), Loss()
    expected = w.dequantize(w.from_packed(Floats(weight, torch.bfloat16), "cpu"))
    monkeypatch.setattr(w, "WEIGHTS_AT_ONCE", 512 * 16)
    assert torch.equal(w.dequantize(w.from_packed(Floats(fp8, torch.bfloat16), "cpu")), expected)
    packed = Packed(weight.view(torch.uint8).view(-1), QUANT_TYPES["F32"], (256, 512))
    gate, up = ([Floats(one, torch.bfloat16, loss=loss)] * 2 for one in (packed, weight))
    experts = w.from_experts(gate, "cpu", below=up)
    assert experts.shape == (2, 512, 512) and loss.total == pytest.approx(4 * float(weight.square().sum()), 1e-4)
    assert torch.equal(w.dequantize(experts), expected.repeat(2, 2, 1))


def test_what_cannot_be_quantized():
    with pytest.raises(WeightError, match="NaN or infinity"):
        w.from_packed(Floats(torch.full((16, 128), float("inf")), torch.float32), "cpu")
    with pytest.raises(UnsupportedError, match="num_bits 4 or 8"):
        w.from_packed(Floats(torch.zeros(16, 128), torch.float32, 3), "cpu")
    with pytest.raises(WeightError, match="160 columns.*multiple of 64"):
        w.from_packed(Floats(torch.zeros(16, 160), torch.float32, 4, 64), "cpu")
