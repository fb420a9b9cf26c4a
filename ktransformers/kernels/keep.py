"""Between the products of attention and attention itself, one launch: norms, rotary positions, and new tokens kept.

Queries turn in place; keys turn and go, with values, straight to their pages (cache.py's slots say where). For latent
attention: the rotary parts of queries turn, the latent is normed, and it and its turned part go to their page.
Letters: T tokens, A heads of queries, C of keys, D and V sizes of a key and a value, R and P of a latent and its rotary
part.
"""

from typing import Any

from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import cache as pages
from ktransformers.kernels import norm, rotary
from ktransformers.kernels.cache import store_fp8
from ktransformers.kernels.compiler import jit, launch, launchable, tl
from ktransformers.kernels.rotary import turn
from ktransformers.native.pages import PAGE


@jit
def keep_kernel(
    q, k, v, positions, cos, sin, q_weight, k_weight, slots, to_keys, to_values, eps, A, C, V, room,
    q_token, q_head, k_token, k_head, v_token, v_head, angle_stride,
    key_page, key_row, key_head, value_page, value_row, value_head,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, PAIRS: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """q [T, A, D] in place, k [T, C, D] and v [T, C, V] to pages. Grid (T, A + 2 C)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = token if positions is None else tl.load(positions + token).to(tl.int64)
    cos += position * angle_stride
    sin += position * angle_stride
    slot = tl.load(slots + token).to(tl.int64)
    held = (slot >= 0) & (slot < room)
    page = slot // 64
    row = slot % 64
    if head < A:
        at = q + token * q_token + head * q_head
        turn(at, at, q_weight, cos, sin, eps, D, HALF, BH, BR, PAIRS, ONE, False)
    elif head < A + C:
        if held:
            at = k + token * k_token + (head - A) * k_head
            to = to_keys + page * key_page + row * key_row + (head - A) * key_head
            turn(at, to, k_weight, cos, sin, eps, D, HALF, BH, BR, PAIRS, ONE, True)
    elif held:
        column = tl.arange(0, BV)
        keep = column < V
        value = tl.load(v + token * v_token + (head - A - C) * v_head + column, mask=keep, other=0)
        to = to_values + page * value_page + row * value_row + (head - A - C) * value_head + column
        tl.store(to, value.to(to_values.dtype.element_ty), mask=keep)


def keep(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor, *,
    positions: Tensor | None = None, pairs: str = "halves", q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 0.0, plus_one: bool = False,
) -> None:  # fmt: skip
    """`rotary.rotate` of q in place and of k, then `cache.append` of that k and v; k and v stay as they are.

    Takes what these two take. Raises UnsupportedError for what does not fit.
    """
    rotary.check(q, k, cos, sin, positions, pairs, q_norm, k_norm)
    pages.check(k, v, slots, to_keys, to_values)
    how = (positions, pairs, q_norm, k_norm, eps, plus_one)
    if not launchable(q.device):
        return reference(q, k, v, cos, sin, slots, to_keys, to_values, *how)
    if len(q):
        made = arguments(q, k, v, cos, sin, slots, to_keys, to_values, *how)
        launch(keep_kernel, (len(q), q.shape[1] + 2 * k.shape[1]), q.device, made)


def arguments(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor,
    positions: Tensor | None = None, pairs: str = "halves", q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 0.0, plus_one: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What `keep_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    value_size = v.shape[2]
    return {
        "q": q, "k": k, "v": v, "positions": positions, "cos": cos, "sin": sin, "q_weight": q_norm, "k_weight": k_norm,
        "slots": slots, "to_keys": to_keys, "to_values": to_values, "eps": float(eps), "A": q.shape[1], "C": k.shape[1],
        "V": value_size, "room": to_keys.shape[0] * PAGE, "q_token": q.stride(0), "q_head": q.stride(1),
        "k_token": k.stride(0), "k_head": k.stride(1), "v_token": v.stride(0), "v_head": v.stride(1),
        "angle_stride": cos.stride(0), "key_page": to_keys.stride(0), "key_row": to_keys.stride(1),
        "key_head": to_keys.stride(2), "value_page": to_values.stride(0), "value_row": to_values.stride(1),
        "value_head": to_values.stride(2), **rotary.sizes(q, cos), "BV": 1 << (value_size - 1).bit_length(),
        "PAIRS": pairs, "ONE": int(plus_one), "num_warps": 1,
    }  # fmt: skip


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, to_keys: Tensor, to_values: Tensor,
    *how: Any,
) -> None:  # fmt: skip
    """What the kernel computes, in torch."""
    k = k.clone()
    rotary.reference(q, k, cos, sin, *how)
    pages.append_reference(k, v, slots, to_keys, to_values)


# --- latent attention ------------------------------------------------------------------------------------------------


@jit
def keep_latents_kernel(
    q, to_q, latents, rotary, positions, cos, sin, weight, slots, cache, eps, A, R, room,
    q_token, q_head, to_q_token, to_q_head, latent_token, rotary_token, angle_stride, page_stride, row_stride,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, PAIRS: tl.constexpr,
    MOVED: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """q [T, A, D] -> to_q, or in place; latents [T, R], normed, and rotary [T, D] to pages. Grid (T, A + 1).

    GROUP: latents with one scale, GROUPS of them, where pages are bytes; else 0.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = token if positions is None else tl.load(positions + token).to(tl.int64)
    cos += position * angle_stride
    sin += position * angle_stride
    if head < A:
        to = to_q + token * to_q_token + head * to_q_head
        turn(q + token * q_token + head * q_head, to, None, cos, sin, 0.0, D, HALF, BH, BR, PAIRS, 0, MOVED)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if (slot >= 0) & (slot < room):
            to = cache + slot // 64 * page_stride + slot % 64 * row_stride
            group = tl.arange(0, GROUPS)
            member = tl.arange(0, BG)[None, :]
            column = group[:, None] * GROUP + member if GROUP > 0 else tl.arange(0, BL)
            inside = (member < GROUP) & (group[:, None] >= 0) if GROUP > 0 else column < R
            x = tl.load(latents + token * latent_token + column, mask=inside, other=0).to(tl.float32)
            if weight is not None:
                x *= tl.rsqrt(tl.sum(x * x) / R + eps)
                x *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
            if GROUP > 0:
                store_fp8(x, to, group, member, R, GROUP)
                end = (to + R + (GROUPS + 3) // 4 * 16).to(tl.pointer_type(tl.bfloat16))
            else:
                tl.store(to + column, x.to(to.dtype.element_ty), mask=inside)
                end = to + R
            turn(rotary + token * rotary_token, end, None, cos, sin, 0.0, D, HALF, BH, BR, PAIRS, 0, True)


def keep_latents(
    q: Tensor, latents: Tensor, rotary_part: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor, *,
    to_q: Tensor | None = None, weight: Tensor | None = None, eps: float = 0.0, positions: Tensor | None = None,
    pairs: str = "halves", group: int = 0,
) -> None:  # fmt: skip
    """The rotary parts of queries [T, A, P] turn, to `to_q` [T, A, P] such as the end of absorbed queries, or in place.

    latents [T, R], after RMSNorm by weight [R] if there is one, and rotary_part [T, P], turned, go to a cache
    [pages, 64, R + P] of floats, or of bytes with a scale for every `group` latents, and stay as they are. All but the
    cache are of one type; sizes contiguous, other strides free. The rest is as in `rotary.rotate` and
    `cache.append_latents`. Raises UnsupportedError for what does not fit.
    """
    to_q = q if to_q is None else to_q
    rotary.check(q, rotary_part[:, None], cos, sin, positions, pairs)
    if group:
        pages.check_fp8(latents, rotary_part, slots, cache, group)
    else:
        pages.check(latents[:, None], rotary_part[:, None], slots, *_parts(cache, latents))
    fits = to_q.shape == q.shape and to_q.stride(2) == 1 and {to_q.dtype, latents.dtype} == {q.dtype}
    if not fits or (weight is not None and (weight.shape != latents.shape[1:] or weight.stride(0) != 1)):
        raise UnsupportedError(
            f"Latents: found to_q {to_q.dtype} {list(to_q.shape)} and a weight "
            f"{None if weight is None else list(weight.shape)}, expected {q.dtype} {list(q.shape)} and "
            f"[{latents.shape[1]}]."
        )
    how = (to_q, weight, eps, positions, pairs, group)
    if not launchable(q.device):
        return latents_reference(q, latents, rotary_part, cos, sin, slots, cache, *how)
    if len(q):
        made = latents_arguments(q, latents, rotary_part, cos, sin, slots, cache, *how)
        launch(keep_latents_kernel, (len(q), q.shape[1] + 1), q.device, made)


def _parts(cache: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The pages of latents and of their rotary parts, [pages, 64, 1, R] and [.., P]."""
    rows = cache[:, :, None]
    return rows[..., : latents.shape[1]], rows[..., latents.shape[1] :]


def latents_arguments(
    q: Tensor, latents: Tensor, rotary_part: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor,
    to_q: Tensor, weight: Tensor | None = None, eps: float = 0.0, positions: Tensor | None = None,
    pairs: str = "halves", group: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What `keep_latents_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    rank = latents.shape[1]
    return {
        "q": q, "to_q": to_q, "latents": latents, "rotary": rotary_part, "positions": positions, "cos": cos, "sin": sin,
        "weight": weight, "slots": slots, "cache": cache, "eps": float(eps), "A": q.shape[1], "R": rank,
        "room": cache.shape[0] * PAGE, "q_token": q.stride(0), "q_head": q.stride(1), "to_q_token": to_q.stride(0),
        "to_q_head": to_q.stride(1), "latent_token": latents.stride(0), "rotary_token": rotary_part.stride(0),
        "angle_stride": cos.stride(0), "page_stride": cache.stride(0), "row_stride": cache.stride(1),
        **rotary.sizes(q, cos), "BL": 1 << (rank - 1).bit_length(), "PAIRS": pairs, "MOVED": to_q is not q,
        "GROUP": group, "GROUPS": rank // group if group else 1, "BG": 1 << (group - 1).bit_length() if group else 1,
        "num_warps": 1,
    }  # fmt: skip


def latents_reference(
    q: Tensor, latents: Tensor, rotary_part: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor,
    to_q: Tensor, weight: Tensor | None = None, eps: float = 0.0, positions: Tensor | None = None,
    pairs: str = "halves", group: int = 0,
) -> None:  # fmt: skip
    """What the kernel computes, in torch."""
    turned, key = q.clone(), rotary_part[:, None].clone()
    rotary.reference(turned, key, cos, sin, positions, pairs)
    to_q.copy_(turned)
    latents = latents if weight is None else norm.reference(latents, weight, eps)
    if group:
        return pages.append_fp8_reference(latents, key[:, 0], slots, cache, group)
    pages.append_reference(latents[:, None], key, slots, *_parts(cache, latents))
