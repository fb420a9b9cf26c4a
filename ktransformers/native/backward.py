"""Routed experts with low-rank adapters, and gradients of experts with and without, on packed bytes.

What is kept of a forward is its inputs; gate and up are computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ktransformers.errors import NativeError
from ktransformers.native.checks import DTYPES, checked_input, read_floats
from ktransformers.native.library import State, pooled

if TYPE_CHECKING:
    from ktransformers.native.experts import Experts

Term = tuple[Tensor | None, Tensor | None, float]
"""A [E, r, in], B [E, out, r] and scale of a low-rank adapter; A and B None where there is none. Of E beyond
the experts that there are nothing is read, and the gradient is zero."""

NO_TERM: Term = (None, None, 0.0)


def forward_adapted(
    experts: Experts, hidden: Tensor, ids: Tensor, weights: Tensor, first: Term = NO_TERM, down: Term = NO_TERM
) -> Tensor:
    """Experts with adapters on what multiplies the input (`first`: gate's rows before up's) and on `down`: [T, H]."""
    state, pool = pooled()
    hidden, ids, weights = experts.arguments(hidden, ids, weights)
    adapters = _both(experts, first, down)
    out = torch.empty_like(hidden)
    status = state.lib.kt_experts_forward_lora(
        experts.handle, pool, *_inputs(state, hidden, ids, weights), *(_struct(state, a) for a in adapters),
        state.ffi.cast("void *", out.data_ptr()),
    )  # fmt: skip
    state.check(status, experts.name)
    return out


def backward_adapted(
    experts: Experts, hidden: Tensor, ids: Tensor, weights: Tensor, d_out: Tensor, first: Term = NO_TERM,
    down: Term = NO_TERM,
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden [T, H], of weights fp32 [T, K] and of those of the adapters' A and B that are there."""
    state, pool = pooled()
    hidden, ids, weights = experts.arguments(hidden, ids, weights)
    d_out = checked_input(d_out.to(hidden.dtype), experts.hidden, f"{experts.name} (gradient)")
    if d_out.shape != hidden.shape:
        raise NativeError(f"{experts.name}: found a gradient {list(d_out.shape)}, expected {list(hidden.shape)}.")
    adapters = _both(experts, first, down)
    gradients = [None if a is None else (torch.zeros_like(a[0]), torch.zeros_like(a[1])) for a in adapters]
    d_hidden, d_weights = torch.empty_like(hidden), torch.empty_like(weights)
    cast = state.ffi.cast
    status = state.lib.kt_experts_backward(
        experts.handle, pool, *_inputs(state, hidden, ids, weights), cast("void *", d_out.data_ptr()),
        *(_struct(state, a, g) for a, g in zip(adapters, gradients, strict=True)),
        cast("void *", d_hidden.data_ptr()), cast("float *", d_weights.data_ptr()),
    )  # fmt: skip
    state.check(status, experts.name)
    made = [d_hidden, d_weights]
    for term, both in zip((first, down), gradients, strict=True):
        if both is not None:
            made += [d.to(given.dtype) for d, given in zip(both, term[:2], strict=True)]
    return made


Adapter = tuple[Tensor, Tensor, float]
"""A Term as C reads it."""


def _both(experts: Experts, first: Term, down: Term) -> list[Adapter | None]:
    """The two terms of `experts`, checked: fp32, and dense."""
    parts = 1 if experts.matrices[0] is None else 2
    sizes = (experts.hidden, parts * experts.intermediate), (experts.intermediate, experts.hidden)
    both = zip(("gate and up" if parts == 2 else "up", "down"), (first, down), sizes, strict=True)
    return [_adapter(experts, f"{experts.name} (adapter of {what})", *rest) for what, *rest in both]


def _adapter(experts: Experts, subject: str, term: Term, sizes: tuple[int, int]) -> Adapter | None:
    a, b, scale = term
    if a is None or b is None:
        if a is not b:
            raise NativeError(f"{subject}: found one of A and B, expected both or neither.")
        return None
    columns, rows = sizes
    known = isinstance(a, Tensor) and a.ndim == 3
    count, rank = (max(experts.count, a.shape[0]), a.shape[1]) if known else (experts.count, 1)
    return (
        read_floats(a, (count, rank, columns), f"{subject}, A"),
        read_floats(b, (count, rows, rank), f"{subject}, B"),
        float(scale),
    )


def _inputs(state: State, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Any, ...]:
    cast = state.ffi.cast
    return (
        cast("void *", hidden.data_ptr()), DTYPES[hidden.dtype], hidden.shape[0], cast("int64_t *", ids.data_ptr()),
        ids.shape[1], cast("float *", weights.data_ptr()),
    )  # fmt: skip


def _struct(state: State, adapter: Adapter | None, gradients: tuple[Tensor, Tensor] | None = None) -> Any:
    """A kt_lora; NULL for None."""
    if adapter is None:
        return state.ffi.NULL
    a, b, scale = adapter
    pointers = [state.ffi.cast("float *", t.data_ptr()) for t in (a, b, *(gradients or ()))]
    return state.ffi.new("kt_lora *", (a.shape[1], scale, *pointers))
