"""Numbers that are quantized when they become words: upstream's Marlin form, symmetric codes about 8 or 128.

Letters: N rows, K columns, G groups of columns that share a scale.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ktransformers.errors import WeightError
from ktransformers.kernels.layouts import Layout, quantized_layout
from ktransformers.kernels.parts import Parts
from ktransformers.quants.blocks import Packed
from ktransformers.quants.scaled import ScaledWeight


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
    """A matrix [N, K] in memory or in its published bytes, used like `Packed`. `dtype`: what its numbers stand for."""

    weight: Tensor | Packed | ScaledWeight
    dtype: torch.dtype
    num_bits: int = 4
    group_size: int = 128
    loss: Loss = field(default_factory=Loss)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def type(self) -> str:
        return self.layout.name

    @property
    def layout(self) -> Layout:
        return quantized_layout(self.dtype, self.shape[-1], self.num_bits, self.group_size)

    def rows(self, start: int, stop: int) -> "Floats":
        weight = self.weight
        return replace(self, weight=weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop))

    def _row_unit(self, step: int) -> int:
        return self.weight._row_unit(step) if isinstance(self.weight, ScaledWeight) else 1

    def parts(self, device: torch.device, scale: torch.dtype) -> Parts:
        """Codes and scales, made on `device`. Raises WeightError for numbers that are not finite."""
        weight = self.weight
        numbers = weight.to(device).float() if isinstance(weight, Tensor) else weight.dequantize(device=device)
        if not bool(numbers.isfinite().all()):
            raise WeightError(f"Cannot quantize a weight of {self.shape[-1]} columns: it holds NaN or infinity.")
        groups = numbers.reshape(len(numbers), -1, self.layout.group or self.shape[-1])
        # The widest weight of a group is half a step beyond the last code.
        half = 1 << (self.num_bits - 1)
        scales = (groups.abs().amax(-1) * 2 / (2 * half - 1)).to(scale)
        step = scales.float().unsqueeze(-1)
        codes = torch.where(step > 0, groups / step, torch.zeros_like(groups)).round().clamp(-half, half - 1)
        self.loss.lost += float((codes * step - groups).square().sum())
        self.loss.total += float(groups.square().sum())
        return Parts((codes + half).to(torch.uint8).flatten(1), scales)
