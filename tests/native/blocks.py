"""Random packed weights for the native tests and benches, with the gguf package as the truth of their values.

Not a test. `Packed` here is the smallest thing that ktransformers.native accepts.
"""

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

FORMATS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176),
           "Q6_K": (256, 210)}  # fmt: skip
"""Name -> values and bytes of a block, written down independently of the library."""


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


def _half(rng: np.random.Generator, shape: tuple[int, ...], value: float) -> np.ndarray:
    return (value * rng.uniform(0.7, 1.3, shape)).astype(np.float16).view(np.uint8).reshape(*shape, 2)


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
    scale = lambda value: _half(rng, (rows, blocks), value)  # noqa: E731
    if name == "Q8_0":
        raw[..., 0:2] = scale(std / 74)
    elif name in ("Q4_K", "Q5_K"):
        top = 15 if name == "Q4_K" else 31
        raw[..., 0:2] = scale(std / (32 * top * 0.29))
        raw[..., 2:4] = scale(std / (32 * top * 0.29) * top / 2)
    elif name == "Q6_K":
        raw[..., 208:210] = scale(std / (74 * 18.5))
    if nasty:
        at = {"Q6_K": 208}.get(name, 0)
        raw[rng.random((rows, blocks)) < 0.2, at : at + 2] = 0
        raw[rng.random((rows, blocks)) < 0.2, at + 1] ^= 0x80
    return Packed(unaligned(raw, int(rng.integers(0, 4))), Type(name), (rows, cols))


def values(packed: Packed) -> torch.Tensor:
    """The weights in float64, by the gguf package."""
    kind = gguf.GGMLQuantizationType[packed.type.name]
    raw = packed.data.numpy().copy().reshape(packed.shape[0], -1)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        raw = raw.view(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
    return torch.from_numpy(dequantize(raw, kind).astype(np.float64)).reshape(packed.shape)
