"""Kernels of attention on a GPU as operators of torch: what looks at a model's steps, and what captures or simulates
them, sees each as one step with its results' shapes. Where nobody looks, they are called past torch's dispatcher.

They write to memory that they are given (slots, pages, queries that turn in place), so none is a pure function.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.kernels import cache, norm
from ktransformers.native import torch_ops

_library = torch.library.Library("ktransformers", "FRAGMENT")  # kept, for its operators end with it


def _slots(table: Tensor, lengths: Tensor, out: Tensor) -> Tensor:
    cache.slots_of(table, lengths, out.numel() // len(table), out)
    return out.new_empty(0)


def _attend(
    q: list[Tensor], k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor, pages: list[Tensor],
    table: Tensor, lengths: Tensor, starts: Tensor | None, number: int,
) -> Tensor:  # fmt: skip
    return torch_ops.find(number).launch(q, k, v, cos, sin, slots, pages, table, lengths, starts)


def _attend_shape(q: list[Tensor], *others: Any) -> Tensor:
    return q[0].new_empty((*q[0].shape[:2], torch_ops.find(others[-1]).width))


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool) -> Tensor:
    return norm.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, plus_one=plus_one).view(x.shape)


for _schema, _compute, _shape in (
    ("slots(Tensor table, Tensor lengths, Tensor out) -> Tensor", _slots, lambda table, lengths, out: out.new_empty(0)),
    ("attend(Tensor[] q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor slots, Tensor[] pages, Tensor table, "
     "Tensor lengths, Tensor? starts, int number) -> Tensor", _attend, _attend_shape),
    ("rms_norm(Tensor x, Tensor? weight, float eps, bool plus_one) -> Tensor", _rms_norm,
     lambda x, weight, eps, plus_one: x.new_empty(x.shape)),
):  # fmt: skip
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ktransformers::{_name}", _shape, lib=_library)


def slots(table: Tensor, lengths: Tensor, out: Tensor) -> None:
    """`cache.slots_of` into `out` [B * T]."""
    (torch.ops.ktransformers.slots.default if torch_ops.is_watched(out) else _slots)(table, lengths, out)


def attend(q: list[Tensor], k: Tensor, *others: Any) -> Tensor:
    """q [N, A, D] (and what of them turns), k [N, C, D], v [N, C, V], cos and sin [N, R/2] or None, slots [N], pages of
    a layer, table, lengths and starts of its sequences, number of a gpu_attention.GpuAttention -> [N, A, its width]."""
    return (torch.ops.ktransformers.attend.default if torch_ops.is_watched(k) else _attend)(q, k, *others)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """x [.., H], each row by its root mean square, times weight [H]."""
    call = torch.ops.ktransformers.rms_norm.default if torch_ops.is_watched(x) else _rms_norm
    return call(x, weight, eps, plus_one)
