"""The torch dequantizers against the `gguf` package, and the arithmetic of packed slices."""

import gguf
import numpy as np
import pytest
import torch

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.quants import blocks as quants_blocks
from ktransformers.quants.blocks import BY_ID, QUANT_TYPES, Packed, dequantize

COMPUTED = quants_blocks.computed_types()


def random_blocks(kind, count, seed):
    """Random bytes: every code, scale and minimum occurs, zero, negative and non-finite scales included."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, kind.nbytes), dtype=np.uint8)


def reference(blocks, kind):
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind.id))


def assert_same_bits(ours, theirs):
    theirs = torch.from_numpy(np.ascontiguousarray(theirs)).reshape(ours.shape)
    same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ, first at {(~same).nonzero()[0].tolist()}"


def test_the_required_types_are_computed():
    """All weight formats that the gguf package dequantizes are computed, and no other quantized one."""
    assert set(QUANT_TYPES) - set(COMPUTED) == {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}


def test_table_agrees_with_gguf():
    """Every type id, name, block and size that the gguf package knows is in the table, and no other."""
    theirs = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {i: (k.name, k.block, k.nbytes) for i, k in BY_ID.items()}
    assert ours == theirs


@pytest.mark.parametrize("name", COMPUTED)
def test_bit_for_bit(name):
    """Random blocks dequantize to the same fp32 bits as in the gguf package."""
    kind = QUANT_TYPES[name]
    count = 4096 if kind.block > 1 else 65536  # every point of every grid occurs
    blocks = random_blocks(kind, count, seed=kind.id)
    ours = dequantize(torch.from_numpy(blocks), kind, (count, kind.block))
    assert_same_bits(ours, reference(blocks.reshape(1, -1), kind))


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("byte", [0x00, 0x7B, 0x80, 0xFF])
def test_extreme_blocks(name, byte):
    """Blocks of one repeated byte (zero scale, largest scale, negative zero, NaN) give the same bits."""
    kind = QUANT_TYPES[name]
    blocks = np.full((3, kind.nbytes), byte, dtype=np.uint8)
    ours = dequantize(torch.from_numpy(blocks), kind, (3, kind.block))
    assert_same_bits(ours, reference(blocks.reshape(1, -1), kind))


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "BF16", "F32", "MXFP4", "IQ1_M", "NVFP4"])
def test_chunks_do_not_show(name, monkeypatch):
    """A tensor larger than a chunk, and not a multiple of it, dequantizes as in one piece."""
    kind = QUANT_TYPES[name]
    blocks = torch.from_numpy(random_blocks(kind, 37, seed=1))
    whole = dequantize(blocks, kind, (37, kind.block))
    monkeypatch.setattr(quants_blocks, "WEIGHTS_AT_ONCE", 5 * kind.block)
    assert_same_bits(dequantize(blocks, kind, (37, kind.block)), whole.numpy())


@pytest.mark.parametrize("name", ["Q4_K", "F32", "BF16", "Q8_0"])
def test_odd_addresses(name):
    """Bytes that start at an odd address, as safetensors allows, dequantize as aligned ones do."""
    kind = QUANT_TYPES[name]
    blocks = torch.from_numpy(random_blocks(kind, 8, seed=2)).reshape(-1)
    shifted = torch.zeros(len(blocks) + 1, dtype=torch.uint8)
    shifted[1:] = blocks
    shape = (8, kind.block)
    assert_same_bits(dequantize(shifted[1:], kind, shape), dequantize(blocks, kind, shape).numpy())


def test_slices_are_views():
    """`expert` and `rows` address the right bytes of a stacked tensor and copy none."""
    kind = QUANT_TYPES["Q4_K"]
    data = torch.from_numpy(random_blocks(kind, 3 * 4 * 2, seed=3)).reshape(-1)
    packed = Packed(data, kind, (3, 4, 512))
    whole = packed.dequantize()
    piece = packed.expert(2).rows(1, 3)
    assert piece.shape == (2, 512) and piece.nbytes == 2 * packed.row_bytes
    assert piece.data.data_ptr() == data.data_ptr() + (2 * 4 + 1) * packed.row_bytes
    assert_same_bits(piece.dequantize(), whole[2, 1:3].numpy())


def test_dtype_of_the_result():
    """A requested dtype is the fp32 value rounded once; F32 to bf16 and BF16 to fp32 included."""
    kind = QUANT_TYPES["Q6_K"]
    data = torch.from_numpy(random_blocks(kind, 4, seed=4))
    data[:, 208:] = torch.tensor([0x00, 0x2C], dtype=torch.uint8)  # d = 0.0625, so everything is finite
    exact = dequantize(data, kind, (4, 256))
    assert torch.equal(dequantize(data, kind, (4, 256), torch.bfloat16), exact.bfloat16())


def test_empty():
    """A slice of no rows dequantizes to an empty tensor."""
    packed = Packed(torch.zeros(2 * 34, dtype=torch.uint8), QUANT_TYPES["Q8_0"], (2, 32))
    assert packed.rows(1, 1).dequantize().shape == (0, 32)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: Packed(p.data[1:], p.type, p.shape),
        lambda p: Packed(p.data, p.type, (2, 31)),
        lambda p: Packed(p.data.float(), p.type, p.shape),
        lambda p: p.rows(0, 3),
        lambda p: p.rows(-1, 1),
        lambda p: p.expert(0),
        lambda p: p.dequantize_into(torch.empty(32, 2)),
    ],
)
def test_sizes_that_do_not_fit(call):
    """Every disagreement between bytes, shape and slice is a WeightError."""
    packed = Packed(torch.zeros(2 * 34, dtype=torch.uint8), QUANT_TYPES["Q8_0"], (2, 32))
    with pytest.raises(WeightError):
        call(packed)


def test_types_not_computed_are_named():
    """A type known by size only says so by name, with the computed ones; a misspelt name gets a hint."""
    with pytest.raises(UnsupportedError, match="Q8_K.*Q4_K"):
        dequantize(torch.zeros(292, dtype=torch.uint8), "Q8_K", (256,))
    with pytest.raises(UnsupportedError, match="Q4_K"):
        quants_blocks.quant_type("Q4K")
