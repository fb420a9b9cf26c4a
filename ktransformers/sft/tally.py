"""What merging did to the numbers, by kind of tensor: how much the adapter changed, and what storing lost again."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktransformers.native import dequantize
from ktransformers.quants.blocks import Packed, QuantType
from ktransformers.quants.scaled import ScaledWeight


@dataclass
class _Sums:
    """Squares, summed."""

    wanted: float = 0.0
    changed: float = 0.0
    lost: float = 0.0
    tensors: set[str] = field(default_factory=set)
    types: dict[str, None] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        share = lambda part: (part / self.wanted) ** 0.5 if self.wanted else 0.0  # noqa: E731
        return {
            "tensors": len(self.tensors), "types": "+".join(self.types), "change": share(self.changed),
            "error": share(self.lost),
        }  # fmt: skip


class Tally:
    """Sums over the tensors that were not written as they were."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Sums] = defaultdict(_Sums)

    def changed(self, name: str, change: Tensor) -> None:
        """The adapter adds `change` to a matrix of `name`."""
        self._kinds[kind_of(name)].changed += _square(change)

    def stored(self, name: str, wanted: Tensor, packed: Tensor, kind: QuantType) -> None:
        """A matrix that should be `wanted` was stored as `packed`."""
        sums = self._kinds[kind_of(name)]
        wanted = wanted.float()
        lost = numbers(Packed(packed.view(-1), kind, tuple(wanted.shape))).sub_(wanted)
        sums.wanted += _square(wanted)
        sums.lost += _square(lost)
        sums.tensors.add(name)
        sums.types[kind.name] = None

    def report(self) -> dict[str, Any]:
        """Of each kind and of `all`: tensors, types, and root mean squares relative to that of the merged weights."""
        every = _Sums()
        for sums in self._kinds.values():
            every.wanted += sums.wanted
            every.changed += sums.changed
            every.lost += sums.lost
            every.tensors |= sums.tensors
            every.types |= sums.types
        kinds = {kind: sums.report() for kind, sums in sorted(self._kinds.items())}
        return {"kinds": kinds, "all": every.report()}


def kind_of(name: str) -> str:
    """What a tensor is in any layer: of blk.3.attn_q.weight attn_q, of a model's names mlp.experts.*.gate_proj."""
    kind = re.sub(r"^(blk|.*?\blayers)\.\d+\.|^model\.", "", name)
    return re.sub(r"\.\d+\.", ".*.", kind).removesuffix(".weight")


def numbers(packed: Packed | ScaledWeight) -> Tensor:
    """What a stored matrix holds, in float32 and in memory of its own; in C where C knows the type."""
    known = isinstance(packed, Packed) and packed.type.in_c
    return dequantize(packed) if known else packed.dequantize()


def _square(tensor: Tensor) -> float:
    flat = tensor.float().reshape(-1)
    return float(torch.dot(flat, flat))
