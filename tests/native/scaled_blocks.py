"""Random weights with separate scales, in the layouts of published checkpoints. Not a test.

ktransformers.quants.scaled is the truth of their values; it is held to the formats' own libraries in tests/loaders.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ktransformers.quants.scaled import SCALE_TYPES, SCALED_TYPES, ScaledWeight


@dataclass(frozen=True)
class Kind:
    """A published format: how a checkpoint of it stores a matrix [N, K]. scale_rows, scale_cols 0: all of them."""

    type: str
    scale_type: str
    scale_rows: int
    scale_cols: int
    zeros: bool = False
    zero_bias: int = 0
    order: bool = False
    global_scale: float = 1.0


KINDS = {
    "FP8": Kind("F8_E4M3", "F32", 128, 128),  # DeepSeek-V3
    "FP8_PERCHANNEL": Kind("F8_E4M3", "F32", 1, 0),
    "MXFP8": Kind("F8_E4M3", "E8M0", 1, 32),
    "MXFP4_SEPARATE": Kind("F4_E2M1", "E8M0", 1, 32),  # gpt-oss, DeepSeek-V4
    "NVFP4_SEPARATE": Kind("F4_E2M1", "E4M3", 1, 16, global_scale=0.125),
    "RAWINT4": Kind("I4", "BF16", 1, 32),  # Kimi-K2
    "INT4_ASYM": Kind("I4", "F16", 1, 128, zeros=True),
    "INT8_ROW": Kind("I8", "F32", 1, 0),
    "INT4_ROW": Kind("I4", "F32", 1, 0),
    "INT8_GROUP": Kind("I8", "BF16", 1, 16),
    "U8_GROUP": Kind("U8", "BF16", 1, 128),
    "GPTQ_INT4": Kind("GPTQ4", "F16", 1, 128),
    "GPTQ_ASYM": Kind("GPTQ4", "F16", 1, 32, zeros=True, zero_bias=1),
    "GPTQ_ORDER": Kind("GPTQ4", "F16", 1, 64, zeros=True, zero_bias=1, order=True),
    "GPTQ_INT8": Kind("GPTQ8", "F16", 1, 128, zeros=True, zero_bias=1),
    "AWQ": Kind("AWQ4", "F16", 1, 128, zeros=True),
}
"""By the names users know, where there are such."""

_SPREAD = {
    "F8_E4M3": 100.0,
    "F4_E2M1": 3.0,
    "I8": 74.0,
    "U8": 74.0,
    "GPTQ8": 74.0,
    "I4": 4.6,
    "GPTQ4": 4.6,
    "AWQ4": 4.6,
}


def _scales(rng: np.random.Generator, kind: Kind, lines: int, each: int, value: float) -> torch.Tensor:
    """uint8 [lines, bytes]: positive scales around `value`, as far as their type can say."""
    value = value / kind.global_scale
    if kind.scale_type == "E8M0":
        codes = np.round(np.log2(value)) + 127 + rng.integers(-1, 2, (lines, each))
        return torch.from_numpy(codes.astype(np.uint8))
    scales = torch.from_numpy(value * rng.uniform(0.7, 1.3, (lines, each))).to(SCALE_TYPES[kind.scale_type])
    return scales.view(torch.uint8).reshape(lines, -1)


def random_scaled(rng: np.random.Generator, name: str | Kind, rows: int, cols: int) -> ScaledWeight:
    """A random matrix of one of KINDS with values of about 1/sqrt(cols). Only codes that are numbers."""
    kind = KINDS[name] if isinstance(name, str) else name
    type_ = SCALED_TYPES[kind.type]
    scale_rows, scale_cols = kind.scale_rows or rows, min(kind.scale_cols or cols, cols)
    groups = -(-cols // scale_cols)
    by_rows = type_.layout == "rows"
    codes = rng.integers(0, 256, type_.lines(rows, cols), dtype=np.uint8)
    if kind.type == "F8_E4M3":
        codes[(codes & 0x7F) == 0x7F] = 0x38
    value = cols**-0.5 / _SPREAD[kind.type]
    scales = _scales(rng, kind, *((-(-rows // scale_rows), groups) if by_rows else (groups, rows)), value)
    zeros = order = None
    if kind.zeros:
        words = (-(-rows // type_.per_word), groups) if by_rows else (groups, rows // type_.per_word)
        zeros = rng.integers(0, 256, (words[0], words[1] * 4), dtype=np.uint8)
        if type_.bits == 8:
            zeros = zeros // 4 + 96  # near the middle, as real ones are
        else:
            zeros = zeros & 0x33 | 0x44
    if kind.order:
        order = torch.from_numpy(rng.permutation(np.arange(cols) // scale_cols).astype(np.int32))
    return ScaledWeight(
        type_, (rows, cols), torch.from_numpy(codes), scales, kind.scale_type, scale_rows, scale_cols,
        None if zeros is None else torch.from_numpy(zeros), kind.zero_bias, order, kind.global_scale,
    )  # fmt: skip
