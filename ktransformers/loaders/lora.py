"""Low-rank adapters by the model's names, whatever file they come from: PEFT's (peft_files.py), or a GGUF LoRA
(gguf_files/lora.py).

Letters: E experts, r rank. A matrix here has a row for each output, also where the model holds it the other way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ktransformers.models.traits import is_transposed


@dataclass(frozen=True)
class LowRank:
    """What is added to one tensor: `scale` * b @ a. `a` [r, in], `b` [out, r], of experts [E, r, in] and [E, out, r].

    `embedding`: of a table that rows are taken from, which files hold otherwise than matrices.
    """

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices that change."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def of(self, expert: int) -> Tensor:
        """The change of one expert's matrix [out, in] in float32, or of the one matrix."""
        a, b = (self.a, self.b) if self.a.dim() == 2 else (self.a[expert], self.b[expert])
        return (b.float() * self.scale) @ a.float()

    def rows(self, b: Tensor) -> LowRank:
        """The same with other rows `b`."""
        return LowRank(self.a, b, self.scale, self.embedding)


@dataclass
class Adapter:
    """Everything an adapter changes: `changes` by the name of the model's tensor, and `replaced`, whole tensors that
    were trained. `alpha` is the file's own, from which scales came."""

    path: Path
    alpha: float
    changes: dict[str, LowRank] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)


# --- experts, as PEFT writes them ---------------------------------------------------------------------------


def from_peft(a: Tensor, b: Tensor, experts: int, exchanged: bool) -> tuple[Tensor, Tensor]:
    """PEFT's factors [E*r, i] and [o, r*E] of a stack of matrices as [E, r, in] and [E, out, r].

    In A experts are outside, in B inside. `exchanged`: what PEFT takes for in is out.
    """
    a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    return (b.transpose(1, 2), a.transpose(1, 2)) if exchanged else (a, b)


def to_peft(a: Tensor, b: Tensor, exchanged: bool) -> tuple[Tensor, Tensor]:
    """The way back."""
    a, b = (b.transpose(1, 2), a.transpose(1, 2)) if exchanged else (a, b)
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def is_exchanged(experts: nn.Module) -> bool:
    """Whether PEFT, which goes by an attribute, takes in for out in the parameters of `experts`."""
    return (getattr(experts, "is_transposed", False) is not True) == is_transposed(experts)


# --- what of a model can be adapted -------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A tensor of the model that can have an adapter: `shape` [(E,) out, in].

    `transposed`: the model holds [E, in, out]. `exchanged`: see `from_peft`. `parameter`: PEFT reaches it as one
    (`target_parameters`), since its module is no linear layer.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    embedding: bool = False
    transposed: bool = False
    exchanged: bool = False
    parameter: bool = False

    @property
    def key(self) -> str:
        """What PEFT's patterns and targets are compared with."""
        return self.name if self.parameter else self.module


def places(model: nn.Module) -> dict[str, Place]:
    """Every matrix of `model` by name, experts' stacks too."""
    return {place.name: place for place in _places(model)}


def _places(model: nn.Module) -> Iterator[Place]:
    for module, found in model.named_modules():
        for own, parameter in found.named_parameters(recurse=False):
            shape, name = tuple(parameter.shape), f"{module}.{own}"
            if len(shape) == 2 and own == "weight":
                known = isinstance(found, (nn.Linear, nn.Embedding))
                yield Place(name, module, shape, isinstance(found, nn.Embedding), parameter=not known)
            elif len(shape) == 3 and own in ("gate_up_proj", "up_proj", "down_proj"):
                turned = is_transposed(found)
                rows = (shape[0], shape[2], shape[1]) if turned else shape
                yield Place(name, module, rows, False, turned, is_exchanged(found), parameter=True)


def shared_input(gate: LowRank | None, up: LowRank | None, rows: int) -> LowRank:
    """Adapters of gate and up, of which one may lack, as one of gate_up: rows of gate come before those of up."""
    one, other = gate or up, up or gate
    if gate is None or up is None:
        zeros = torch.zeros(*one.b.shape[:-2], rows, one.rank, dtype=one.b.dtype)
        return one.rows(torch.cat((one.b, zeros) if up is None else (zeros, one.b), -2))
    if one.scale == other.scale and torch.equal(one.a, other.a):
        return one.rows(torch.cat((one.b, other.b), -2))
    lead, zeros = one.b.shape[:-2], one.b.new_zeros
    upper = torch.cat((one.b, zeros(*lead, rows, other.rank)), -1)
    lower = torch.cat((zeros(*lead, rows, one.rank), other.b * (other.scale / one.scale)), -1)
    return LowRank(torch.cat((one.a, other.a), -2), torch.cat((upper, lower), -2), one.scale)
