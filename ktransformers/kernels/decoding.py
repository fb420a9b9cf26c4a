"""How kernels read words: fields of bits become floats without a conversion, and a group's scale is decoded once.

The mantissa trick: a code is moved to bit TO of a float's mantissa and the exponent of 1 is set, so that the bits read
as 1 + code / FACTOR. A group's sum is then FACTOR * (dot - sum of x), and no instruction converts. Logic takes one
literal, which is the mask; so `one`, the bits of 1.0, is read from memory, that it may be in a register.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ktransformers.kernels.compiler import jit, tl
from ktransformers.kernels.layouts import PLANES, TABLES
from ktransformers.kernels.words import Words

_TO = {2: 20, 3: 20, 4: 16, 5: 16, 6: 16, 8: 15}
"""Bits of a code -> where it goes: high, as sums round at 2^-24 of FACTOR codes, and where one code of a word is."""


def constants(words: Words) -> dict[str, Any]:
    """What a kernel is compiled for: BITS to VALUES of its signature."""
    layout, planes = words.layout, PLANES[words.layout.bits]
    return {
        "TO": _TO[layout.bits], "BITS0": planes[0], "BITS1": planes[1] if len(planes) > 1 else 0,
        "GROUP": layout.group, "SCALE": layout.scale, "MINIMUM": layout.minimum,
        "ZERO": layout.zero, "ZERO_BIAS": layout.zero_bias, "VALUES": layout.values,
    }  # fmt: skip


def pointers(words: Words) -> dict[str, Any]:
    """The tensors of a weight under the names of a kernel's signature; None for those that it lacks."""
    return {
        "plane0": words.planes[0], "plane1": words.planes[1] if len(words.planes) > 1 else None,
        "scales": words.scales, "minima": words.minima, "d": words.d, "dmin": words.dmin,
        "table": table(words.layout.values, words.device), "order": words.order,
    }  # fmt: skip


@functools.cache
def table(name: str, device: torch.device) -> Tensor:
    """The 16 values of codes that are no integers, and 1: float32 [17]."""
    return torch.tensor([*TABLES.get(name, [0] * 16), 1], dtype=torch.float32, device=device)


@jit
def bits_of_one(table):
    return tl.load(table + 16).to(tl.int32, bitcast=True)


@jit
def field(word, AT: tl.constexpr, BITS: tl.constexpr, TO: tl.constexpr):
    """The `BITS` bits from `AT` on, moved to `TO`; all other bits zero."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << TO
    if AT > TO:
        return (word >> (AT - TO)) & MASK
    elif AT < TO:
        return (word << (TO - AT)) & MASK
    else:
        return word & MASK


@jit
def code_at(low, high, base, C: tl.constexpr, BITS0: tl.constexpr, BITS1: tl.constexpr, TO: tl.constexpr):
    """Code `C` of a word of the first plane, whose fields in the second begin at bit 0: at bit `TO` of `base`.

    The first "or" is an exclusive one, lest LLVM join it with the second: (word & mask) | rest is one instruction.
    """
    code = field(low, C * BITS0, BITS0, TO) ^ base
    if BITS1 > 0:
        code = field(high, C * BITS1, BITS1, TO + BITS0) | code
    return code


@jit
def value_at(
    low, high, table, one,
    C: tl.constexpr, TO: tl.constexpr, BITS0: tl.constexpr, BITS1: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Code `C` as a float32: 1 + code / FACTOR, or a table's value; of E2M1 2^-126 times, of E4M3 2^-120 times that.

    These have an exponent and a mantissa already: they go where a float has its lowest ones, and subnormals stay so.
    """
    if VALUES == "E2M1":
        sign = (low << (28 - C * 4)) & -2147483648
        return (field(low, C * 4, 3, 22) | sign).to(tl.float32, bitcast=True)
    elif VALUES == "E4M3":
        sign = (low << (24 - C * 8)) & -2147483648
        return (field(low, C * 8, 7, 20) | sign).to(tl.float32, bitcast=True)
    elif VALUES == "IQ4":
        return tl.load(table + code_at(low, high, 0, C, BITS0, BITS1, 0))
    else:
        return code_at(low, high, one, C, BITS0, BITS1, TO).to(tl.float32, bitcast=True)


@jit
def scale_and_minimum(
    scales, minima, d, dmin, at, super_at, keep,
    SCALE: tl.constexpr, MINIMUM: tl.constexpr, ZERO: tl.constexpr, ZERO_BIAS: tl.constexpr,
):  # fmt: skip
    """Of groups at offsets `at`, and `super_at` in d and dmin: the factor of codes and what is subtracted, float32."""
    raw = tl.load(scales + at, mask=keep, other=0)
    if SCALE == "E8M0":
        scale = tl.maximum(raw.to(tl.int32) << 23, 0x00400000).to(tl.float32, bitcast=True)
    elif SCALE == "NIBBLES":
        scale = (raw & 15).to(tl.float32) * tl.load(d + super_at, mask=keep, other=0).to(tl.float32)
    elif SCALE == "U8" or SCALE == "I8":
        scale = raw.to(tl.float32) * tl.load(d + super_at, mask=keep, other=0).to(tl.float32)
    else:
        scale = raw.to(tl.float32)
    if SCALE == "NIBBLES":
        minimum = (raw >> 4).to(tl.float32) * tl.load(dmin + super_at, mask=keep, other=0).to(tl.float32)
    elif MINIMUM == "U8":
        stored = tl.load(minima + at, mask=keep, other=0).to(tl.float32)
        minimum = stored * tl.load(dmin + super_at, mask=keep, other=0).to(tl.float32)
    elif MINIMUM == "F16":
        minimum = tl.load(minima + at, mask=keep, other=0).to(tl.float32)
    elif MINIMUM == "ZEROS":
        minimum = scale * (tl.load(minima + at, mask=keep, other=0).to(tl.float32) + ZERO_BIAS)
    else:
        minimum = scale * ZERO
    return scale, minimum


@jit
def group_of(k, GROUP: tl.constexpr):
    """The line of scales of columns from `k` on."""
    if GROUP == 0:
        return k * 0
    else:
        return k // GROUP


@jit
def of_expert(
    plane0, plane1, scales, minima, d, dmin, expert, K, P,
    BITS0: tl.constexpr, BITS1: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The pointers to a weight's parts, moved to matrix `expert` (int64)."""
    lines = expert * P
    plane0 += lines * (K // 32 * BITS0)
    if plane1 is not None:
        plane1 += lines * (K // 32 * BITS1)
    groups = K // GROUP if GROUP > 0 else 1
    scales += lines * groups
    if minima is not None:
        minima += lines * groups
    if d is not None:
        d += lines * (K // 256)
    if dmin is not None:
        dmin += lines * (K // 256)
    return plane0, plane1, scales, minima, d, dmin
