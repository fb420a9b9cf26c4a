"""Kernels of a layer on a GPU as operators of torch: what looks at a model's steps, and what captures or simulates
them, sees each as one step with its results' shapes. Where nobody looks, they are called past torch's dispatcher.

They write to memory that they are given (slots, pages, queries that turn in place), so none is a pure function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers.kernels import cache, compiler, norm, router, swiglu
from ktransformers.native import torch_ops
from ktransformers.native.experts import Glu

_library = torch.library.Library("ktransformers", "FRAGMENT")  # kept, for its operators end with it


def _slots(table: Tensor, lengths: Tensor, out: Tensor) -> Tensor:
    cache.slots_of(table, lengths, out.numel() // len(table), out)
    return out.new_empty(0)


def _keep_fp8(latents: Tensor, rotary: Tensor, slots: Tensor, pages: Tensor, group: int) -> Tensor:
    cache.append_latents(latents, rotary, slots, pages, group)
    return slots.new_empty(0)


def _attend(
    q: list[Tensor], k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor, pages: list[Tensor],
    table: Tensor, lengths: Tensor, starts: Tensor | None, number: int,
) -> Tensor:  # fmt: skip
    return torch_ops.find(number).launch(q, k, v, cos, sin, slots, pages, table, lengths, starts)


def _attend_shape(q: list[Tensor], *others: Any) -> Tensor:
    return q[0].new_empty((*q[0].shape[:2], torch_ops.find(others[-1]).width))


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    return norm.rms_norm(_rows(x), weight, eps, plus_one=plus_one).view(x.shape)


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    total = residual.new_empty(residual.shape)
    made = norm.rms_norm(
        _rows(x), weight, eps, residual=_rows(residual).contiguous(), plus_one=plus_one, total=_rows(total)
    )
    return total, made.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _glu(up: Tensor, gate: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    halves = None if gate is None else _rows(gate)
    return swiglu.glu(_rows(up), halves, Glu(activation, alpha, limit)).view(up.shape)


def _choose(logits: Tensor, bias: Tensor | None, factors: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    return router.choose(logits, torch_ops.find(number).choice, bias, factors)


def _choose_shape(logits: Tensor, bias: Tensor | None, factors: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    shape = len(logits), torch_ops.find(number).choice.top_k
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


for _schema, _compute, _shape in (
    ("slots(Tensor table, Tensor lengths, Tensor out) -> Tensor", _slots, lambda table, lengths, out: out.new_empty(0)),
    ("keep_fp8(Tensor latents, Tensor rotary, Tensor slots, Tensor pages, int group) -> Tensor", _keep_fp8,
     lambda latents, rotary, slots, pages, group: slots.new_empty(0)),
    ("attend(Tensor[] q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor slots, Tensor[] pages, Tensor table, "
     "Tensor lengths, Tensor? starts, int number) -> Tensor", _attend, _attend_shape),
    ("rms_norm(Tensor x, Tensor? weight, float eps, bool plus_one=False) -> Tensor", _rms_norm,
     lambda x, weight, eps, plus_one=False: x.new_empty(x.shape)),
    ("add_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool plus_one) -> (Tensor, Tensor)", _add_norm,
     lambda x, residual, weight, eps, plus_one: (x.new_empty(x.shape), x.new_empty(x.shape))),
    ("glu(Tensor up, Tensor? gate, str activation, float alpha, float limit) -> Tensor", _glu,
     lambda up, gate, activation, alpha, limit: up.new_empty(up.shape)),
    ("choose(Tensor logits, Tensor? bias, Tensor? factors, int number) -> (Tensor, Tensor)", _choose, _choose_shape),
):  # fmt: skip
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ktransformers::{_name}", _shape, lib=_library)


def why_not(operator: Any) -> str:
    """Why kernels do not compute where an operator is, or ``""``. Where there may be a GPU, it is started."""
    if is_in_torch_dispatch_mode():
        return "a simulation has no weights to compute with"
    device = torch.device(operator.devices.get(operator.key, operator.generate_device))
    return compiler.why_not(device) or compiler.too_old(device)


def _call(name: str, past: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of that name, or where nobody looks, what it does."""
    operator = getattr(torch.ops.ktransformers, name).default

    def call(first: Any, *others: Any) -> Any:
        looked_at = first[0] if isinstance(first, list) else first
        return (operator if torch_ops.is_watched(looked_at) else past)(first, *others)

    return call


slots = _call("slots", _slots)
"""(table, lengths, out [B * T]): `cache.slots_of` into `out`."""
keep_fp8 = _call("keep_fp8", _keep_fp8)
"""(latents [N, R], rotary parts [N, P], slots [N], pages of bytes, latents with one scale): `cache.append_latents`"""
attend = _call("attend", _attend)
"""([queries [N, A, D], and where the rotary parts of latent ones are], k [N, C, D], v [N, C, V], cos and sin [N, R/2]
or None, slots [N], pages of a layer, table, lengths and starts of its sequences, number of a
gpu_attention.GpuAttention) -> [N, A, its width]"""
rms_norm = _call("rms_norm", _rms_norm)
"""(x [.., H], weight [H] or None, eps, whether the factor is 1 + weight) -> [.., H]"""
add_norm = _call("add_norm", _add_norm)
"""(x [.., H], residual [.., H], weight, eps, plus_one) -> (residual + x, that normed)"""
glu = _call("glu", _glu)
"""(up [.., I], gate or None, activation, alpha, limit) -> [.., I], as gating.Gating says"""
choose = _call("choose", _choose)
"""(logits [T, E], bias of choice and factors [E] or None, number of what has a `choice`) -> (ids, weights [T, K])"""
