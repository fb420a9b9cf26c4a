"""Weights of floats, quantized when they become words: upstream's Marlin form, symmetric codes about 8 or 128.

Letters: N rows, K columns, G groups of columns that share a scale.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.kernels.layouts import Layout, scaled_layout
from ktransformers.kernels.parts import Parts
from ktransformers.quants.blocks import Packed

NUM_BITS, GROUP_SIZES = (4, 8), (32, 64, 128, -1)
"""What weights can be quantized to; -1 is one scale a row."""


@dataclass
class Loss:
    """What quantizing took, of all weights that share this."""

    lost: float = 0.0
    total: float = 0.0

    @property
    def share(self) -> float:
        """Root mean square of what was lost, as a share of the weights'."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0


@dataclass(frozen=True, eq=False)
class Floats:
    """A matrix [N, K] of floats, in memory or in its published bytes, used like `Packed`."""

    weight: Tensor | Packed
    num_bits: int = 4
    group_size: int = 128
    loss: Loss = field(default_factory=Loss)

    def __post_init__(self) -> None:
        if self.num_bits not in NUM_BITS or self.group_size not in GROUP_SIZES:
            raise UnsupportedError(
                f"Quantizing to {self.num_bits} bits in groups of {self.group_size}: expected num_bits 4 or 8, "
                "group_size 32, 64, 128, or -1 for one scale a row."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def type(self) -> str:
        return f"floats for {self.num_bits} bits"

    @property
    def layout(self) -> Layout:
        columns = self.shape[-1]
        dtype = self.weight.type.torch_dtype if isinstance(self.weight, Packed) else self.weight.dtype
        # Scales have the weight's own type: they reach as far as it does.
        scale = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")
        group = columns if self.group_size == -1 else self.group_size
        kind = "U8" if self.num_bits == 8 else "I4"
        return replace(scaled_layout(kind, columns, group, scale), name=f"INT{self.num_bits}")

    def rows(self, start: int, stop: int) -> "Floats":
        weight = self.weight.rows(start, stop) if isinstance(self.weight, Packed) else self.weight[start:stop]
        return replace(self, weight=weight)

    def parts(self, device: torch.device, scale: torch.dtype) -> Parts:
        """Codes and scales, made on `device`. Raises WeightError for numbers that are not finite."""
        weight = self.weight
        numbers = weight.dequantize(device=device) if isinstance(weight, Packed) else weight.to(device).float()
        if not bool(numbers.isfinite().all()):
            raise WeightError(f"Cannot quantize a weight of {self.shape[-1]} columns: it holds NaN or infinity.")
        groups = numbers.view(len(numbers), -1, self.layout.group or self.shape[-1])
        # The widest weight of a group is half a step beyond the last code.
        half = 1 << (self.num_bits - 1)
        scales = (groups.abs().amax(-1) * 2 / (2 * half - 1)).to(scale)
        step = scales.float().unsqueeze(-1)
        codes = torch.where(step > 0, groups / step, torch.zeros_like(groups)).round().clamp(-half, half - 1)
        self.loss.lost += float((codes * step - groups).square().sum())
        self.loss.total += float(groups.square().sum())
        return Parts((codes + half).to(torch.uint8).flatten(1), scales)
