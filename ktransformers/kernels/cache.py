"""New tokens into the pages of a cache on a GPU: one launch a layer, by a table of slots that all layers share.

A slot is page * 64 + row; below 0 or beyond the cache it is none, and its token is not kept, so padding of a captured
graph's batch costs nothing. Letters: N tokens, B sequences, C heads, D and V sizes of a key and a value, R and P of a
latent and its rotary part.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels.compiler import cdiv, jit, launch, launchable, tl
from ktransformers.kernels.context import PAGE
from ktransformers.kernels.mla_decode import row_bytes

MOST_E4M3 = 448.0


@jit
def slots_kernel(table, lengths, out, tokens, pages, table_stride, BLOCK: tl.constexpr):
    """Of the last `tokens` tokens of each sequence -> out int64 [B, tokens]. Grid (blocks of tokens, B)."""
    b = tl.program_id(1)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(lengths + b) - tokens + t
    keep = (t < tokens) & (at >= 0) & (at < pages * 64)
    page = tl.load(table + b.to(tl.int64) * table_stride + at // 64, mask=keep, other=-1).to(tl.int64)
    slot = tl.where(page >= 0, page * 64 + at % 64, -1)
    tl.store(out + b.to(tl.int64) * tokens + t, slot, mask=t < tokens)


def slots_of(table: Tensor, lengths: Tensor, tokens: int, out: Tensor | None = None) -> Tensor:
    """table int32 [B, pages], lengths int32 [B], new tokens counted -> int64 [B * tokens]: where the last `tokens`
    tokens of each sequence lie, -1 where there is no page. Allocates nothing when given `out`."""
    batch = len(table)
    if lengths.shape != (batch,) or table.dtype != torch.int32 or lengths.dtype != torch.int32 or table.stride(1) != 1:
        raise UnsupportedError(
            f"Slots: found a table {table.dtype} {list(table.shape)} and lengths {lengths.dtype} "
            f"{list(lengths.shape)}, expected int32 [B, pages] and [B]."
        )
    out = torch.empty(batch * tokens, dtype=torch.int64, device=table.device) if out is None else out
    if out.dtype != torch.int64 or out.shape != (batch * tokens,) or not out.is_contiguous():
        raise UnsupportedError(f"Slots: found out {out.dtype} {list(out.shape)}, expected int64 [{batch * tokens}].")
    if out.numel() and launchable(table.device):
        launch(slots_kernel, (cdiv(tokens, 128), batch), out.device, slots_arguments(table, lengths, out))
    elif out.numel():
        out.copy_(slots_reference(table, lengths, tokens))
    return out


def slots_arguments(table: Tensor, lengths: Tensor, out: Tensor) -> dict[str, Any]:
    """What `slots_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "table": table, "lengths": lengths, "out": out, "tokens": out.numel() // len(table), "pages": table.shape[1],
        "table_stride": table.stride(0), "BLOCK": 128, "num_warps": 1,
    }  # fmt: skip


def slots_reference(table: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    at = lengths.long()[:, None] - tokens + torch.arange(tokens, device=table.device)
    held = (at >= 0) & (at < table.shape[1] * PAGE)
    page = table.long().gather(1, torch.where(held, at, 0) // PAGE)
    return torch.where(held & (page >= 0), page * PAGE + at % PAGE, -1).view(-1)


# --- keys and values, latents and rotary parts: copied ---------------------------------------------------------------


@jit
def append_kernel(
    first, second, slots, to_first, to_second, room, D, V,
    first_token, first_head, second_token, second_head,
    to_first_page, to_first_token, to_first_head, to_second_page, to_second_token, to_second_head,
    BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """first [N, C, D], second [N, C, V] -> rows of the pages. Grid (N, C); `room` is how many slots there are."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot < 0) | (slot >= room):
        return
    page = slot // 64
    row = slot % 64
    column = tl.arange(0, BD)
    value = tl.load(first + token * first_token + head * first_head + column, mask=column < D)
    to = to_first + page * to_first_page + row * to_first_token + head * to_first_head + column
    tl.store(to, value.to(to_first.dtype.element_ty), mask=column < D)
    column = tl.arange(0, BV)
    value = tl.load(second + token * second_token + head * second_head + column, mask=column < V)
    to = to_second + page * to_second_page + row * to_second_token + head * to_second_head + column
    tl.store(to, value.to(to_second.dtype.element_ty), mask=column < V)


def append(keys: Tensor, values: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor) -> None:
    """keys [N, C, D] and values [N, C, V] into pages [pages, 64, C, D] and [pages, 64, C, V], as their type; slots
    integers [N], each but those that are none once. Sizes are contiguous, other strides free. Raises UnsupportedError
    for what does not fit."""
    check(keys, values, slots, to_keys, to_values)
    if not launchable(keys.device):
        return append_reference(keys, values, slots, to_keys, to_values)
    if slots.numel() and keys.shape[1]:
        grid, made = tuple(keys.shape[:2]), append_arguments(keys, values, slots, to_keys, to_values)
        launch(append_kernel, grid, keys.device, made)


def check(keys: Tensor, values: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor) -> None:
    """Raises UnsupportedError where these do not fit each other."""
    for found, to in ((keys, to_keys), (values, to_values)):
        fits = found.dim() == 3 and to.dim() == 4 and to.shape[1] == PAGE and to.shape[2:] == found.shape[1:]
        fits = fits and len(found) == slots.numel() and found.stride(2) == to.stride(3) == 1 and slots.is_contiguous()
        if not fits or len(to_keys) != len(to_values) or {found.device, slots.device} != {to.device}:
            raise UnsupportedError(
                f"Cache: found {list(found.shape)} on {found.device} and {slots.numel()} slots for pages "
                f"{list(to.shape)} on {to.device}, expected [N, heads, size], N slots and [pages, {PAGE}, heads, size]."
            )


def append_arguments(keys: Tensor, values: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor) -> dict[str, Any]:
    """What `append_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    block = lambda size: 1 << (size - 1).bit_length()  # noqa: E731
    size, value_size = keys.shape[2], values.shape[2]
    return {
        "first": keys, "second": values, "slots": slots, "to_first": to_keys, "to_second": to_values,
        "room": to_keys.shape[0] * PAGE, "D": size, "V": value_size, "first_token": keys.stride(0),
        "first_head": keys.stride(1), "second_token": values.stride(0), "second_head": values.stride(1),
        "to_first_page": to_keys.stride(0), "to_first_token": to_keys.stride(1), "to_first_head": to_keys.stride(2),
        "to_second_page": to_values.stride(0), "to_second_token": to_values.stride(1),
        "to_second_head": to_values.stride(2), "BD": block(size), "BV": block(value_size), "num_warps": 1,
    }  # fmt: skip


def append_reference(keys: Tensor, values: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor) -> None:
    room = to_keys.shape[0] * PAGE
    kept = torch.nonzero((slots >= 0) & (slots < room))[:, 0]
    page, row = slots[kept].long() // PAGE, slots[kept].long() % PAGE
    to_keys[page, row] = keys[kept].to(to_keys.dtype)
    to_values[page, row] = values[kept].to(to_values.dtype)


# --- latents, as floats or in FP8 ------------------------------------------------------------------------------------


@jit
def e4m3_of(x):
    """The byte nearest to each float32 of -448 to 448, ties to even, by arithmetic on bits."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.abs(x)
    magnitude = size.to(tl.uint32, bitcast=True)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # 120 more in the exponent, 3 bits behind it
    small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF  # 16384 counts in steps of 2^-9, as what is below 2^-6
    return tl.where(size < 0.015625, small, normal).to(tl.uint8) | ((bits >> 24) & 0x80).to(tl.uint8)


@jit
def store_fp8(x, to, group, member, R: tl.constexpr, GROUP: tl.constexpr):
    """Latents, float32 [groups, BG], to the row of bytes that begins at `to`, as mla_decode.py reads it.

    A scale is a group's largest number over 448; NaN where one of them is NaN, so that all of them read as NaN.
    """
    scale = tl.max(tl.abs(x), axis=1) / 448.0
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), scale)
    code = e4m3_of(tl.minimum(tl.maximum(tl.div_rn(x, scale[:, None] + x * 0), -448.0), 448.0))
    tl.store(to + group[:, None] * GROUP + member, code, mask=member < GROUP)
    tl.store((to + R).to(tl.pointer_type(tl.float32)) + group, scale)


@jit
def append_fp8_kernel(
    latents, rotary, slots, cache, room, latent_token, rotary_token, page_stride, row_stride,
    R: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """latents [N, R], rotary [N, P] -> rows of bytes. Grid (N,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot < 0) | (slot >= room):
        return
    to = cache + slot // 64 * page_stride + slot % 64 * row_stride
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, BG)[None, :]
    at = group[:, None] * GROUP + member
    x = tl.load(latents + token * latent_token + at, mask=member < GROUP, other=0).to(tl.float32)
    store_fp8(x, to, group, member, R, GROUP)
    column = tl.arange(0, BP)
    value = tl.load(rotary + token * rotary_token + column, mask=column < P)
    tl.store(
        (to + R + (GROUPS + 3) // 4 * 16).to(tl.pointer_type(tl.bfloat16)) + column,
        value.to(tl.bfloat16),
        mask=column < P,
    )


def append_latents(latents: Tensor, rotary: Tensor, slots: Tensor, cache: Tensor, group: int = 0) -> None:
    """latents [N, R] and rotary [N, P] into a cache [pages, 64, R + P] of floats, or of bytes with a scale for every
    `group` latents (mla_decode.py). slots integers [N]. Raises UnsupportedError for what does not fit."""
    rank, rope = latents.shape[-1], rotary.shape[-1]
    if not group:
        return append(latents[:, None], rotary[:, None], slots, *cache[:, :, None].split((rank, rope), dim=3))
    check_fp8(latents, rotary, slots, cache, group)
    if not launchable(cache.device):
        return append_fp8_reference(latents, rotary, slots, cache, group)
    if slots.numel():
        made = append_fp8_arguments(latents, rotary, slots, cache, group)
        launch(append_fp8_kernel, (slots.numel(),), cache.device, made)


def check_fp8(latents: Tensor, rotary: Tensor, slots: Tensor, cache: Tensor, group: int) -> None:
    """Raises UnsupportedError where these do not fit each other."""
    rank, row = latents.shape[-1], row_bytes(latents.shape[-1], rotary.shape[-1], group)
    fits = cache.dtype == torch.uint8 and cache.shape[1:] == (PAGE, row) and cache.stride(2) == 1 and rank % group == 0
    fits = fits and len(latents) == len(rotary) == slots.numel() and latents.stride(1) == rotary.stride(1) == 1
    if not fits or not slots.is_contiguous() or {latents.device, rotary.device, slots.device} != {cache.device}:
        raise UnsupportedError(
            f"Cache: found latents {list(latents.shape)}, rotary {list(rotary.shape)} and {slots.numel()} slots for "
            f"pages {list(cache.shape)} of {cache.dtype}, expected N of each and uint8 [pages, {PAGE}, {row}]."
        )


def append_fp8_arguments(latents: Tensor, rotary: Tensor, slots: Tensor, cache: Tensor, group: int) -> dict[str, Any]:
    """What `append_fp8_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    block = lambda size: 1 << (size - 1).bit_length()  # noqa: E731
    rank, rope = latents.shape[1], rotary.shape[1]
    return {
        "latents": latents, "rotary": rotary, "slots": slots, "cache": cache, "room": cache.shape[0] * PAGE,
        "latent_token": latents.stride(0), "rotary_token": rotary.stride(0), "page_stride": cache.stride(0),
        "row_stride": cache.stride(1), "R": rank, "P": rope, "GROUP": group, "GROUPS": rank // group,
        "BG": block(group), "BP": block(rope), "num_warps": 1,
    }  # fmt: skip


def append_fp8_reference(latents: Tensor, rotary: Tensor, slots: Tensor, cache: Tensor, group: int) -> None:
    kept = torch.nonzero((slots >= 0) & (slots < cache.shape[0] * PAGE))[:, 0]
    x = latents[kept].float().unflatten(1, (-1, group))
    scale = x.abs().amax(-1) / MOST_E4M3
    scale = torch.where(scale == 0, 1.0, scale)
    code = (x / scale[..., None]).clamp(-MOST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    rotary = rotary[kept].to(torch.bfloat16).view(torch.uint8)
    page, row = slots[kept].long() // PAGE, slots[kept].long() % PAGE
    for at, part in ((0, code), (code.shape[1], scale.view(torch.uint8)), (cache.shape[2] - rotary.shape[1], rotary)):
        cache[page, row, at : at + part.shape[1]] = part
