"""Routed experts and dense MLPs as `native.Experts`, where the C library computes all of them. Computes nothing."""

from typing import Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.gating import Gating, probes
from ktransformers.operators.inner_ops import StagedOperator, is_cpu
from ktransformers.operators.linear import KLinearCPUInfer, KTransformersLinear
from ktransformers.operators.routing import packed_weight
from ktransformers.operators.twin import close, remembered, twin
from ktransformers.quants.blocks import Packed


def experts_in_c(experts: nn.Module) -> native.Experts | None:
    """The C experts of a `KTransformersExperts` that computes nothing besides; None for any other module."""
    if not isinstance(experts, StagedOperator):  # a wrapper may have its attributes, too
        return None
    inner = experts.active
    found = getattr(inner, "experts", None)
    if not isinstance(found, native.Experts) or not getattr(inner, "cpu_only", False):
        return None
    alone = experts.split is None and not experts.idle and not hasattr(experts, "post_expert_norm")
    return found if alone and (experts.out_device is None or is_cpu(experts.out_device)) else None


@remembered
def mlp_gating(mlp: nn.Module) -> Gating | None:
    """What a dense MLP does between its products, by what it gives for chosen gate and up; None where that is nothing
    that C computes. Looks at no weights."""
    return _gating(mlp)


class _Gives(nn.Module):
    """In the place of a linear layer: gives what it is told, or its input."""

    def __init__(self, value: Tensor | None = None):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


def _gating(mlp: nn.Module) -> Gating | None:
    gate, up = probes()
    linears = {"gate_proj": _Gives(gate), "up_proj": _Gives(up), "gate_up_proj": _Gives(torch.cat((gate, up), -1)),
               "down_proj": _Gives()}  # fmt: skip
    stubs = {name: stub for name, stub in linears.items() if name in mlp._modules}
    if {"gate_up_proj", "up_proj"} <= stubs.keys() or "down_proj" not in stubs:
        return None
    found = twin(mlp, torch.float32, stubs)(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))
    if stubs.keys() == {"up_proj", "down_proj"}:
        tried = [Gating(name, has_gate=False) for name in native.ACTIVATIONS if name != "swigluoai"]
    else:
        limits = [v for k, v in vars(mlp).items() if "limit" in k and isinstance(v, (int, float))]
        alphas = [v for k, v in vars(mlp).items() if "alpha" in k and isinstance(v, (int, float))]
        tried = [Gating(n, a, limit) for limit in (float("inf"), *limits) for n in native.ACTIVATIONS
                 for a in (alphas if n == "swigluoai" else [1.0])]  # fmt: skip
    return next((g for g in tried if g.activation != "gelu_tanh" and close(found, g.apply(gate, up), 1e-5)), None)


def mlp_in_c(mlp: nn.Module) -> native.Experts | None:
    """A dense MLP as one expert on the bytes of its linear layers; None where C does not compute it, or they are not
    on the CPU, or something else than linear layers computes them (an adapter, a user's operator)."""
    gating = None if is_foreign(mlp) else mlp_gating(mlp)
    if gating is None:
        return None
    parts = {name: _linear(mlp._modules[name]) for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
             if name in mlp._modules}  # fmt: skip
    if None in parts.values():
        return None
    if "gate_up_proj" in parts and not _split(parts):
        return None
    biases = {role: parts[f"{role}_proj"][1] for role in ("gate", "up", "down") if f"{role}_proj" in parts}
    made = {f"{role}_bias": None if b is None else b.detach().view(1, -1) for role, b in biases.items()}
    matrices = [[parts[n][0]] if n in parts else None for n in ("gate_proj", "up_proj", "down_proj")]
    glu = native.Glu(gating.activation, gating.alpha, gating.limit, **made)
    return native.Experts(*matrices, glu, name=getattr(mlp, "key", type(mlp).__name__))


def is_foreign(module: nn.Module) -> bool:
    """An operator with a forward of its own."""
    return isinstance(module, BaseInjectedModule) and type(module).forward is not BaseInjectedModule.forward


def _linear(linear: nn.Module) -> tuple[Any, Tensor | None] | None:
    """Weight and bias of a linear layer as C reads them; or None."""
    weight = packed_weight(linear)
    if weight is None or (bool(linear._forward_hooks) or bool(linear._forward_pre_hooks)):
        return None
    if isinstance(linear, KTransformersLinear) and isinstance(linear.active, KLinearCPUInfer):
        return weight, linear.active.linear.bias
    return weight, linear.bias


def _split(parts: dict) -> bool:
    """gate_up_proj becomes gate_proj and up_proj, in place; False where its rows cannot be told apart."""
    weight, bias = parts.pop("gate_up_proj")
    if not isinstance(weight, Packed):
        return False
    rows, columns = weight.shape[0] // 2, weight.shape[1]
    for i, name in enumerate(("gate_proj", "up_proj")):
        data = weight.data.chunk(2)[i]
        half = None if bias is None else bias[i * rows : (i + 1) * rows]
        parts[name] = (Packed(data, weight.type, (rows, columns)), half)
    return True
