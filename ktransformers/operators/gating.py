"""What experts do between their two products: activation(gate) * up and its published variants.

A family's experts module says how it gates in code (`_apply_gate`), not in data. Here that code is recognized by its
results, so that the C library can be told its name and numbers; `Gating.apply` is the formula that C is held to.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ktransformers.models.traits import is_interleaved
from ktransformers.native import ACTIVATIONS


@dataclass(frozen=True)
class Gating:
    """One formula from gate and up [.., I] to what down multiplies, [.., I].

    With L = `limit`, first gate = min(gate, L) and up = min(max(up, -L), L). Then
    "swigluoai": (up + 1) * gate * sigmoid(`alpha` * gate); any other name: activation(gate) * up.
    Without a gate (`has_gate` false): activation(up), and no limit.
    """

    activation: str
    alpha: float = 1.0
    limit: float = math.inf
    has_gate: bool = True

    def apply(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if not self.has_gate:
            return ACT2FN[self.activation](up)
        if self.limit != math.inf:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation == "swigluoai":
            return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        return ACT2FN[self.activation](gate) * up


def gating_of(experts: nn.Module) -> Gating | None:
    """The gating of a family's experts module, or None when it is none that `Gating` knows."""
    name = _activation_name(getattr(experts, "act_fn", None))
    if getattr(experts, "has_gate", True) is False:
        return Gating(name, has_gate=False) if name else None
    if not hasattr(experts, "_apply_gate"):
        return Gating(name) if name else None
    gate, up = probes()
    try:
        with torch.no_grad():
            joined = torch.cat((gate, up), -1)
            joined = interleaved(joined) if is_interleaved(experts) else joined
            found = apply_gate(experts, joined)
    except Exception:  # the family's code may want anything: weights, other shapes, a device
        return None
    for candidate in _candidates(experts, name):
        expected = candidate.apply(gate, up)
        if found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-5, atol=1e-6):
            return candidate
    return None


def _activation_name(act_fn: nn.Module | None) -> str | None:
    """The name of an activation as configs spell it, such as ``silu``, or None."""
    if act_fn is None:
        return None
    return next((name for name in ACT2FN if type(ACT2FN[name]) is type(act_fn)), None)


def apply_gate(experts: nn.Module, gate_up: Tensor) -> Tensor:
    """The family's own gating of gate_up [.., 2I], or the usual one where it has none."""
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _candidates(experts: nn.Module, name: str | None) -> Iterator[Gating]:
    limits = _numbers(experts, "limit", "swiglu_limit", otherwise=math.inf)
    alphas = _numbers(experts, "alpha", "swiglu_alpha", otherwise=1.0)
    for activation in dict.fromkeys(filter(None, (name, "silu"))):
        yield Gating(activation)
        yield from (Gating(activation, limit=limit) for limit in limits)
    yield from (Gating("swigluoai", alpha, limit) for alpha, limit in itertools.product(alphas, limits))


def _numbers(experts: nn.Module, *names: str, otherwise: float) -> list[float]:
    """Those of a module's attributes that are numbers, or `otherwise`; which its code reads, only a trial says."""
    values = (getattr(experts, name, None) for name in names)
    found = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return list(dict.fromkeys(found)) or [otherwise]


def probes() -> tuple[Tensor, Tensor]:
    """Every pair of a range that no published limit contains, as gate and up [1, 1024]."""
    line = torch.linspace(-40.0, 41.0, 32, dtype=torch.float32, device="cpu")
    return line.repeat(32).view(1, -1), line.repeat_interleave(32).view(1, -1)


def interleaved(gate_up: Tensor) -> Tensor:
    """Gate before up [.., 2I], as gate and up in turn."""
    return gate_up.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def uncomputed(experts: nn.Module, gating: Gating | None) -> str:
    """What about these experts neither the C library nor the GPU kernels compute, or ``""``."""
    if gating is None:
        act_fn = getattr(experts, "act_fn", None)
        own = getattr(type(experts), "_apply_gate", None)
        usual = own is None or own.__name__ == "_default_apply_gate"
        return f"the activation {type(act_fn).__name__}" if usual else "their own gating (_apply_gate)"
    return "" if gating.activation in ACTIVATIONS else f"the activation {gating.activation!r}"
