"""Random packed weights for the native tests and benches, with the gguf package as the truth of their values.

Not a test. `Packed` here is the smallest thing that ktransformers.native accepts.
"""

from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

FORMATS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
           "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
           "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66),
           "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18),
           "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36)}  # fmt: skip
"""Name -> values and bytes of a block, written down independently of the library."""

HALF_AT = {"Q4_0": 0, "Q4_1": 0, "Q5_0": 0, "Q5_1": 0, "Q8_0": 0, "Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0,
           "Q6_K": 208, "IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "IQ4_NL": 0,
           "IQ4_XS": 0, "TQ1_0": 52, "TQ2_0": 64}  # fmt: skip
"""Where a block's fp16 scale lies."""

SECOND = {"Q4_1": (2, -7.5), "Q5_1": (2, -15.5), "Q2_K": (82, 1.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}
"""Where its second fp16 number lies, and what times the scale centres random values."""


@dataclass(frozen=True)
class Type:
    name: str


@dataclass(frozen=True)
class Packed:
    data: torch.Tensor
    type: Type
    shape: tuple[int, ...]


def unaligned(raw: np.ndarray, offset: int = 1) -> torch.Tensor:
    """The bytes as a uint8 tensor that starts `offset` bytes past an allocation, as a mapped file may."""
    flat = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    room = np.empty(flat.size + offset + 1, dtype=np.uint8)
    room[offset : offset + flat.size] = flat
    return torch.from_numpy(room)[offset : offset + flat.size]


def _half(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).view(np.uint8).reshape(*value.shape, 2)


def set_scales(raw: np.ndarray, name: str, scale: np.ndarray, second: np.ndarray | None = None) -> None:
    """Overwrite the scales in blocks uint8 [..., nbytes] with `scale` [...], and the second number likewise.

    Formats without fp16 scales take the closest magnitude that they can hold.
    """
    if name == "MXFP4":  # of doubled values: half of 2^(e - 127)
        raw[..., 0] = np.clip(np.floor(np.log2(np.maximum(abs(scale), 1e-38))) + 128, 0, 254)
        return
    if name == "NVFP4":  # of doubled values, four a block
        raw[..., 0:4] = gguf.quants.NVFP4.fp32_to_ue4m3(abs(2 * scale).astype(np.float32))[..., None]
        return
    if name == "IQ1_M":  # a nibble of the scale in the top of each of four 16-bit words
        half = _half(scale)
        nibbles = np.stack([half & 15, half >> 4], -1).reshape(*scale.shape, 4)
        raw[..., 49:56:2] = (raw[..., 49:56:2] & 15) | nibbles << 4
        return
    at = HALF_AT[name]
    raw[..., at : at + 2] = _half(scale)
    if name in SECOND:
        at, ratio = SECOND[name]
        raw[..., at : at + 2] = _half(scale * ratio if second is None else second * ratio)


@cache
def _unit_std(name: str) -> float:
    """Standard deviation of random blocks whose scale is 1."""
    raw = np.random.default_rng(0).integers(0, 256, (256, FORMATS[name][1]), dtype=np.uint8)
    set_scales(raw, name, np.ones(256))
    return float(dequantize(raw, gguf.GGMLQuantizationType[name]).std())


def random_weight(rng: np.random.Generator, name: str, rows: int, cols: int, nasty: bool = False) -> Packed:
    """A random matrix with values of about 1/sqrt(cols). `nasty`: extreme codes, zero and negative scales."""
    std = cols**-0.5
    if name in ("F32", "F16", "BF16"):
        value = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(std)
        if nasty:
            value[rng.random(value.shape) < 0.3] = 0.0
            value[rng.random(value.shape) < 0.02] *= 100.0
        tensor = torch.from_numpy(value).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name])
        return Packed(unaligned(tensor.view(torch.uint8).numpy()), Type(name), (rows, cols))
    block, size = FORMATS[name]
    blocks = cols // block
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    if nasty:  # whole blocks at the ends of the range
        pick = rng.random((rows, blocks))
        raw[pick < 0.2] = 0
        raw[pick > 0.8] = 255
        raw[(pick > 0.45) & (pick < 0.55)] = 128
    around = std / _unit_std(name)
    scale, second = (around * rng.uniform(0.7, 1.3, (rows, blocks)) for _ in range(2))
    if nasty:
        scale[rng.random(scale.shape) < 0.2] = 0.0
        scale[rng.random(scale.shape) < 0.2] *= -1.0
    set_scales(raw, name, scale, second)
    return Packed(unaligned(raw, int(rng.integers(0, 4))), Type(name), (rows, cols))


def values(packed: Packed) -> torch.Tensor:
    """The weights in float64, by the gguf package."""
    kind = gguf.GGMLQuantizationType[packed.type.name]
    raw = packed.data.numpy().copy().reshape(packed.shape[0], -1)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        raw = raw.view(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
    return torch.from_numpy(dequantize(raw, kind).astype(np.float64)).reshape(packed.shape)
