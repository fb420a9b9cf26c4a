"""The C calls as operators of torch (`torch.ops.ktransformers`), which the dispatcher knows by name and shape; linears
and experts that kernels compute on a GPU, too.

So torch.compile and torch.export put each into their graphs as one step, fake and meta tensors get shapes without a
computation, and profilers show it. A schema has no type for a handle of C: torch's own class objects need C++, and its
opaque Python objects are experimental. So an operator names its Linear, Experts, Router or Block by a number, never
given twice; the object, not the number, keeps weights alive.
They are defined on a bare Library, which costs 4 us a call; `torch.library.custom_op` costs 14 and an autograd formula
6 more (one core of a Sapphire Rapids, torch 2.13). Where nobody looks, a call goes past the dispatcher (`is_watched`):
13 us for a linear of 32 x 32, as before. Linears and experts have gradients (their weights have none); the others are
called where nobody wants any.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers.errors import NativeError
from ktransformers.native import backward
from ktransformers.native.checks import DTYPES


class LinearCall(Protocol):
    """What `linear` needs of the object that a number names: native.Linear. `on_gpu` is false where there is none."""

    name: str
    in_features: int
    out_features: int

    def compute(self, x: Tensor) -> Tensor: ...


class EmbeddingCall(Protocol):
    """What `embedding` needs: native.Embedding."""

    hidden: int

    def compute(self, ids: Tensor, dtype: torch.dtype) -> Tensor: ...


class ExpertsCall(Protocol):
    """What `experts` needs: native.Experts."""

    name: str
    hidden: int

    def compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor: ...


class RouterCall(Protocol):
    """What `router` needs: native.Router."""

    name: str
    hidden: int
    count: int
    choice: Any

    def compute(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class BlockCall(Protocol):
    """What `moe` needs: native.Block."""

    name: str
    hidden: int

    def compute(self, hidden: Tensor) -> Tensor: ...


class AttentionCall(Protocol):
    """What `attention` needs: native.Attention, with the pages as a second number."""

    name: str
    hidden: int

    def compute(
        self, hidden: Tensor, pages: Any, positions: Any, mask: Tensor | None, mask_first: int, q_factor: Tensor | None
    ) -> Tensor: ...


_named: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def name_it(call: Any) -> int:
    """The number by which the operators here know `call` from now on, for as long as it lives."""
    number = next(_numbers)
    _named[number] = call
    return number


def _find(number: int) -> Any:
    """What `name_it` gave that number. Raises NativeError where it is gone."""
    call = _named.get(number)
    if call is None:
        raise NativeError(
            f"torch.ops.ktransformers, number {number}: found no weights, for their model is gone. A compiled or "
            "exported program holds none: keep the model that it was made from, or make it again."
        )
    return call


find = _find  # for operators that are defined elsewhere (operators/gpu_ops.py)


def is_watched(x: Tensor) -> bool:
    """Whether more than numbers is wanted of a call on `x`: a graph, shapes alone, or a line in a profile."""
    return not x.is_nested and (is_traced(x) or profiler._is_profiler_enabled)


def wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_traced(x: Tensor) -> bool:
    """Whether a graph is made of what happens to `x`, or it has no values."""
    return type(x) is not Tensor or torch.compiler.is_compiling() or x.is_meta or is_in_torch_dispatch_mode()


def _linear(x: Tensor, number: int) -> Tensor:
    return _find(number).compute(x)


def _embedding(ids: Tensor, dtype: torch.dtype, number: int) -> Tensor:
    return _find(number).compute(ids, dtype)


def _embedding_shape(ids: Tensor, dtype: torch.dtype, number: int) -> Tensor:
    return ids.new_empty((*ids.shape, _find(number).hidden), dtype=dtype)


def _experts(hidden: Tensor, ids: Tensor, weights: Tensor, number: int) -> Tensor:
    return _find(number).compute(hidden, ids, weights)


def _linear_backward(d_y: Tensor, number: int) -> Tensor:
    return _find(number).backward(d_y)


def _linear_backward_shape(d_y: Tensor, number: int) -> Tensor:
    return d_y.new_empty((*d_y.shape[:-1], _find(number).in_features))


def _experts_backward(
    d_out: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    return _find(number).backward(hidden, ids, weights, d_out)


def _experts_backward_shape(
    d_out: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weights.new_empty(weights.shape, dtype=torch.float32)


def _adapted(
    hidden: Tensor, ids: Tensor, weights: Tensor, first_a: Tensor | None, first_b: Tensor | None, first_scale: float,
    down_a: Tensor | None, down_b: Tensor | None, down_scale: float, number: int,
) -> Tensor:  # fmt: skip
    adapters = (first_a, first_b, first_scale), (down_a, down_b, down_scale)
    return backward.forward_adapted(_find(number), hidden, ids, weights, *adapters)


def _adapted_shape(hidden: Tensor, *rest: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _given(hidden: Tensor, *rest: Any) -> Tensor:
    return hidden.new_zeros(()).expand(hidden.shape)  # one number: it is there for its gradient


def _computed(given: Tensor, *call: Any) -> Tensor:
    return _adapted(*call)


def _computed_shape(given: Tensor, *call: Any) -> Tensor:
    return _adapted_shape(*call)


def _adapted_backward(
    d_out: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, first_a: Tensor | None, first_b: Tensor | None,
    first_scale: float, down_a: Tensor | None, down_b: Tensor | None, down_scale: float, number: int,
) -> list[Tensor]:  # fmt: skip
    adapters = (first_a, first_b, first_scale), (down_a, down_b, down_scale)
    return backward.backward_adapted(_find(number), hidden, ids, weights, d_out, *adapters)


def _adapted_backward_shape(
    d_out: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, first_a: Tensor | None, first_b: Tensor | None,
    first_scale: float, down_a: Tensor | None, down_b: Tensor | None, down_scale: float, number: int,
) -> list[Tensor]:  # fmt: skip
    factors = [t.new_empty(t.shape) for t in (first_a, first_b, down_a, down_b) if t is not None]
    return [hidden.new_empty(hidden.shape), weights.new_empty(weights.shape, dtype=torch.float32), *factors]


def _attention(
    hidden: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, first: int, number: int, pages: int,
    q_factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    positions = None if cos is None or sin is None else (cos, sin)
    return _find(number).compute(hidden, _find(pages), positions, mask, first, q_factor)


def _attention_shape(
    hidden: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, first: int, number: int, pages: int,
    q_factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    call = _find(number)
    _check_fake(hidden, call.hidden, call)
    return hidden.new_empty(hidden.shape)


def _linear_shape(x: Tensor, number: int) -> Tensor:
    call = _find(number)
    _check_fake(x, call.in_features, call)
    return x.new_empty((*x.shape[:-1], call.out_features))


def _experts_shape(hidden: Tensor, ids: Tensor, weights: Tensor, number: int) -> Tensor:
    call = _find(number)
    _check_fake(hidden, call.hidden, call)
    return hidden.new_empty(hidden.shape)


def _router(hidden: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    return _find(number).compute(hidden)


def _router_shape(hidden: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    call = _find(number)
    _check_fake(hidden, call.hidden, call)
    tokens, k = hidden.shape[0], call.choice.top_k
    ids, weights = hidden.new_empty((tokens, k), dtype=torch.int64), hidden.new_empty((tokens, k), dtype=torch.float32)
    return ids, weights, hidden.new_empty((tokens, call.count), dtype=torch.float32)


def _moe(hidden: Tensor, number: int) -> Tensor:
    return _find(number).compute(hidden)


def _moe_shape(hidden: Tensor, number: int) -> Tensor:
    call = _find(number)
    _check_fake(hidden, call.hidden, call)
    return hidden.new_empty(hidden.shape)


def _check_fake(x: Tensor, cols: int, call: Any) -> None:
    """As much of `checks.checked_input` as holds for a tensor without values."""
    here = x.device.type in ("cpu", "meta") or getattr(call, "on_gpu", False)
    if not here or x.dtype not in DTYPES or x.dim() < 1 or x.shape[-1] != cols:
        found, known = f"{x.dtype} {list(x.shape)} on {x.device}", "float32, bfloat16 or float16"
        raise NativeError(f"{call.name}: found input of {found}, expected {known} [..., {cols}] on the cpu.")


_FACTORS = "Tensor? first_a, Tensor? first_b, float first_scale, Tensor? down_a, Tensor? down_b, float down_scale"
_library = torch.library.Library("ktransformers", "DEF")  # kept, for the operators end with it
for _schema, _compute, _shape in (
    ("linear(Tensor x, int number) -> Tensor", _linear, _linear_shape),
    ("embedding(Tensor ids, ScalarType dtype, int number) -> Tensor", _embedding, _embedding_shape),
    ("experts(Tensor hidden, Tensor ids, Tensor weights, int number) -> Tensor", _experts, _experts_shape),
    ("attention(Tensor hidden, Tensor? cos, Tensor? sin, Tensor? mask, int first, int number, int pages, "
     "Tensor? q_factor=None) -> Tensor", _attention, _attention_shape),
    ("router(Tensor hidden, int number) -> (Tensor, Tensor, Tensor)", _router, _router_shape),
    ("moe(Tensor hidden, int number) -> Tensor", _moe, _moe_shape),
    ("linear_backward(Tensor d_y, int number) -> Tensor", _linear_backward, _linear_backward_shape),
    ("experts_backward(Tensor d_out, Tensor hidden, Tensor ids, Tensor weights, int number) -> (Tensor, Tensor)",
     _experts_backward, _experts_backward_shape),
    (f"adapted_experts(Tensor hidden, Tensor ids, Tensor weights, {_FACTORS}, int number) -> Tensor",
     _adapted, _adapted_shape),
    (f"given_experts(Tensor hidden, Tensor ids, Tensor weights, {_FACTORS}, int number) -> Tensor", _given, _given),
    (f"computed_experts(Tensor given, Tensor hidden, Tensor ids, Tensor weights, {_FACTORS}, int number) -> Tensor",
     _computed, _computed_shape),
    ("adapted_experts_backward(Tensor d_out, Tensor hidden, Tensor ids, Tensor weights, "
     f"{_FACTORS}, int number) -> Tensor[]", _adapted_backward, _adapted_backward_shape),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _compute, "CompositeExplicitAutograd")  # every device: ours is the message that refuses one
    torch.library.register_fake(f"ktransformers::{_name}", _shape, lib=_library)


def adapted_experts(hidden: Tensor, ids: Tensor, weights: Tensor, *adapters_and_number: Any) -> Tensor:
    """`experts` with low-rank adapters: after the weights A [E, r, in], B [E, out, r] and scale for what multiplies the
    input and for down, each or neither (NO_ADAPTERS), and the number.

    Where gradients are wanted, what they need is kept before anything is computed. A layer that is computed again for
    its backward (torch.utils.checkpoint) stops at what it kept last; in most families that is here, and the product is
    not made twice.
    """
    call = hidden, ids, weights, *adapters_and_number
    operators = torch.ops.ktransformers
    if is_watched(hidden) or not wants_gradient(*(t for t in call if isinstance(t, Tensor))):
        return operators.adapted_experts.default(*call)
    return operators.computed_experts.default(operators.given_experts.default(*call), *call)


NO_ADAPTERS = None, None, 0.0, None, None, 0.0


def _number(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.number = inputs[-1]
    ctx.call = _named.get(ctx.number)  # kept until the backward


def _linear_gradient(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
    return torch.ops.ktransformers.linear_backward(d_y, ctx.number), None


def _keep_call(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _number(ctx, inputs, output)
    given = inputs[:-1]
    ctx.save_for_backward(*(t for t in given if isinstance(t, Tensor)))
    ctx.scales = [x for x in given if isinstance(x, float)]
    ctx.present = [isinstance(t, Tensor) for t in given]


def _experts_gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    hidden, ids, weights = ctx.saved_tensors
    d_hidden, d_weights = torch.ops.ktransformers.experts_backward(d_out, hidden, ids, weights, ctx.number)
    return d_hidden, None, d_weights.to(weights.dtype), None


def _adapted_gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    hidden, ids, weights, *factors = ctx.saved_tensors
    left, scales = iter(factors), iter(ctx.scales)
    given = [(next(left) if there else None) if i % 3 != 2 else next(scales) for i, there in enumerate(ctx.present[3:])]
    made = torch.ops.ktransformers.adapted_experts_backward(d_out, hidden, ids, weights, *given, ctx.number)
    d_hidden, d_weights, *d_factors = made
    left = iter(d_factors)
    gradients = [next(left) if there else None for there in ctx.present[3:]]
    return d_hidden, None, d_weights.to(weights.dtype), *gradients, None


def _computed_gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return d_out, *[None] * 10


for _name, _backward, _keep in (
    ("linear", _linear_gradient, _number),
    ("experts", _experts_gradient, _keep_call),
    ("adapted_experts", _adapted_gradient, _keep_call),
    ("given_experts", _adapted_gradient, _keep_call),
    ("computed_experts", _computed_gradient, _number),
):
    torch.library.register_autograd(f"ktransformers::{_name}", _backward, setup_context=_keep, lib=_library)

linear = torch.ops.ktransformers.linear.default
"""(x [..., K], number) -> [..., N]"""
embedding = torch.ops.ktransformers.embedding.default
"""(ids [...], dtype, number) -> [..., H]"""
experts = torch.ops.ktransformers.experts.default
"""(hidden [T, H], ids [T, K], weights [T, K], number) -> [T, H]"""
attention = torch.ops.ktransformers.attention.default
"""(hidden [B, S, H], cos and sin [B or 1, S, R] or None, mask or None, its first token, number, number of the pages,
factors of queries [B or 1, S] or None) -> [B, S, H]. It appends to the pages: not a pure function, so a graph that runs
it twice appends twice."""
router = torch.ops.ktransformers.router.default
"""(hidden [T, H], number) -> (ids [T, K], weights [T, K], logits [T, E])"""
moe = torch.ops.ktransformers.moe.default
"""(hidden [T, H], number) -> [T, H]"""
