"""New tokens into pages, in Triton's interpreter and by the reference, against indexing; FP8 against torch's own."""

import pytest
import torch

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import cache as k
from ktransformers.kernels import compiler, mla_decode
from tests.kernels.paged import int32


@pytest.fixture(params=["kernel", "reference"])
def way(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")
    return request.param


def test_slots(way):
    """Of sequences shorter than the new tokens, over a page's end, on a page that is none, beyond the table."""
    table = torch.tensor([[5, 2], [7, 1], [3, -1], [4, 6]], dtype=torch.int32)
    slots = k.slots_of(table, int32([1, 65, 66, 129]), 3).view(4, 3)
    assert slots.tolist() == [[-1, -1, 320], [7 * 64 + 62, 7 * 64 + 63, 64], [3 * 64 + 63, -1, -1], [6 * 64 + 62, 6 * 64 + 63, -1]]
    out = torch.zeros(12, dtype=torch.int64)
    assert k.slots_of(table, int32([1, 65, 66, 129]), 3, out) is out and torch.equal(out.view(4, 3), slots)
    assert k.slots_of(table[:, :1], int32([0] * 4), 200).unique().tolist() == [-1]
    assert k.slots_of(table[:0], int32([]), 2).shape == (0,)
    with pytest.raises(UnsupportedError, match=r"expected int32 \[B, pages\]"):
        k.slots_of(table.long(), int32([1] * 4), 3)
    with pytest.raises(UnsupportedError, match=r"expected int64 \[12\]"):
        k.slots_of(table, int32([1] * 4), 3, out.int())


@pytest.mark.parametrize("heads, size, value_size, kind", [(1, 16, 16, torch.int64), (3, 24, 40, torch.int32)])
def test_keys_and_values(way, heads, size, value_size, kind):
    """Views of one product; slots that are none, in and beyond the cache; all else stays as it was."""
    rows = torch.randn(5, heads * (size + value_size))
    keys, values = (part.unflatten(1, (heads, -1)) for part in rows.split([heads * size, heads * value_size], 1))
    to_keys, to_values = torch.full((3, 64, heads, size), -7.0), torch.full((3, 64, heads, value_size), -7.0)
    slots = torch.tensor([64, -1, 191, 192, 3], dtype=kind)
    expected = to_keys.clone(), to_values.clone()
    for token, slot in ((0, 64), (2, 191), (4, 3)):
        expected[0].view(-1, heads, size)[slot], expected[1].view(-1, heads, value_size)[slot] = keys[token], values[token]
    k.append(keys, values, slots, to_keys, to_values)
    assert torch.equal(to_keys, expected[0]) and torch.equal(to_values, expected[1])


def test_no_tokens(way):
    cache = torch.zeros(2, 64, 1, 16)
    k.append(torch.zeros(0, 1, 16), torch.zeros(0, 1, 16), torch.zeros(0, dtype=torch.int64), cache, cache)
    assert not cache.any()


def test_latents_as_floats(way):
    """Rows of a latent and its rotary part, rounded to what the cache keeps."""
    latents, rotary, cache = torch.randn(2, 32), torch.randn(2, 16), torch.zeros(2, 64, 48, dtype=torch.float16)
    k.append_latents(latents, rotary, torch.tensor([127, 0]), cache)
    assert torch.equal(cache.view(-1, 48)[[127, 0]], torch.cat([latents, rotary], 1).half())
    assert int(cache.count_nonzero()) == 96


@pytest.mark.parametrize("rank, group", [(64, 64), (64, 16), (96, 96)])
def test_latents_in_fp8(way, rank, group):
    """Large, small, zero; read back by mla_decode's own reading, and the same bytes as torch's FP8."""
    rope, tokens = 16, 6
    latents = torch.randn(tokens, rank) * torch.tensor([1, 1e-20, 1e20, 0, 448, 3])[:, None]
    rotary = torch.randn(tokens, rope).bfloat16()
    cache = torch.zeros(1, 64, mla_decode.row_bytes(rank, rope, group), dtype=torch.uint8)
    k.append_latents(latents, rotary, torch.arange(tokens), cache, group)
    scale = latents.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale == 0, 1, scale)
    codes = (latents.unflatten(1, (-1, group)) / scale).to(torch.float8_e4m3fn)
    assert torch.equal(cache[0, :tokens, :rank], codes.view(torch.uint8).flatten(1))
    made = mla_decode.numbers(cache[0, :tokens], rank, rope, group)
    assert torch.equal(made[:, rank:], rotary.float())
    assert torch.equal(made[:, :rank], (codes.float() * scale).flatten(1))
    assert not cache[0, tokens:].any()


def test_every_byte_of_fp8_and_what_lies_between(interpreter):
    """All numbers that bytes can be, and all halfway between two: ties go to even bytes, as in torch."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([448.0] * 3)])
    numbers = torch.cat([numbers, -numbers]).view(4, 128)
    latents = torch.nn.functional.pad(numbers, (0, 128), value=448.0)  # so that the scale is 1
    cache = torch.zeros(1, 64, mla_decode.row_bytes(256, 16, 256), dtype=torch.uint8)
    k.append_latents(latents, torch.zeros(4, 16), torch.arange(4), cache, 256)
    assert torch.equal(cache[0, :4, :128], numbers.to(torch.float8_e4m3fn).view(torch.uint8))


def test_a_latent_that_is_no_number_is_not_lost(way):
    latents = torch.ones(2, 32)
    latents[0, 5] = float("nan")
    cache = torch.zeros(1, 64, mla_decode.row_bytes(32, 16, 32), dtype=torch.uint8)
    k.append_latents(latents, torch.zeros(2, 16), torch.arange(2), cache, 32)
    made = mla_decode.numbers(cache[0, :2], 32, 16, 32)
    assert made[0, :32].isnan().all() and made[1].isfinite().all()


def test_what_does_not_fit_is_refused():
    keys, cache, slots = torch.zeros(2, 3, 16), torch.zeros(4, 64, 3, 16), torch.zeros(2, dtype=torch.int64)
    for args in (
        (keys[:, :2], keys, slots, cache, cache), (keys, keys, slots[:1], cache, cache), (keys, keys, slots, cache[:, :32], cache),
        (keys, keys, slots, cache, cache[:3]), (keys.transpose(1, 2), keys, slots, cache.transpose(2, 3), cache),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="expected .N, heads, size"):
            k.append(*args)
    with pytest.raises(UnsupportedError, match="expected N of each and uint8"):
        k.append_latents(keys[:, 0], keys[:, 0], slots, cache[:, :, 0].to(torch.uint8), 16)
    assert compiler.ON_CPU is False
