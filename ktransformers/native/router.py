"""The router of a layer of experts: a product, and a choice with parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError, did_you_mean
from ktransformers.native import torch_ops
from ktransformers.native.checks import DTYPES, checked_input, read_floats
from ktransformers.native.library import loaded, pooled
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed

SCORES = {"none": 0, "softmax": 1, "sigmoid": 2, "sqrtsoftplus": 3}
BIAS_ON = {"none": 0, "score": 1, "logit": 2}
GROUP_BY = {"max": 0, "best2": 1}
WEIGH = {"score": 0, "softmax": 1, "sigmoid": 2}
DIVIDE = {"none": 0, "sum": 1, "clamp": 2}
"""Names of kt_scoring, kt_bias_on, kt_group_by, kt_weigh, kt_divide; a test holds them to the header."""


@dataclass(frozen=True)
class Choice:
    """How experts are scored, chosen and weighed; the formulas are in kt_native.h.

    `round`: logits (and what the norm gives) are rounded to the input's dtype. `cap` 0: none. `bias_on`: what the
    choice bias is added to. `groups` 0: none. `divide`: by the weights' sum + `divide_by` ("sum"), or by the larger of
    the two ("clamp").
    """

    top_k: int
    score: str = "softmax"
    bias_on: str = "none"
    weigh: str = "score"
    divide: str = "none"
    divide_by: float = 0.0
    factor: float = 1.0
    groups: int = 0
    groups_kept: int = 0
    group_by: str = "best2"
    masked: float = -math.inf
    cap: float = 0.0
    round: bool = False
    norm_eps: float = 0.0
    norm_factor: float = 1.0


class Router:
    """ids and weights of the experts for each token. Keeps the weight alive; makes no copy of it. No gradients."""

    def __init__(
        self,
        weight: Packed,
        choice: Choice,
        bias: torch.Tensor | None = None,
        choice_bias: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        name: str = "router",
    ) -> None:
        """`weight` [E, H]; `bias`, `choice_bias`, `factors` float [E], `norm` float [H], or None.

        Raises UnsupportedError for a weight type without C code, NativeError for what does not fit.
        """
        state = loaded()
        self.name, self.choice = name, choice
        self._keep: list[Any] = []
        w = state.ffi.new("kt_weight *")
        self.count, self.hidden = fill_weight(state, weight, f"{name} (weight)", self._keep, w)
        desc = state.ffi.new("kt_router_desc *")
        desc.weight, desc.top_k = w, choice.top_k
        for field, names in (
            ("score", SCORES),
            ("bias_on", BIAS_ON),
            ("group_by", GROUP_BY),
            ("weigh", WEIGH),
            ("divide", DIVIDE),
        ):
            setattr(desc, field, _number(names, getattr(choice, field), field, name))
        desc.round, desc.cap = choice.round, choice.cap
        desc.norm_eps, desc.norm_factor = choice.norm_eps, choice.norm_factor
        desc.groups, desc.groups_kept, desc.masked = choice.groups, choice.groups_kept, choice.masked
        desc.divide_by, desc.factor = choice.divide_by, choice.factor
        vectors = {"bias": bias, "choice_bias": choice_bias, "factors": factors, "norm": norm}
        for field, vector in vectors.items():
            width = self.hidden if field == "norm" else self.count
            setattr(desc, field, self._vector(state, vector, field.replace("_", " "), width))
        out = state.ffi.new("kt_router **")
        state.check(state.lib.kt_router_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_router_destroy)
        self.number = torch_ops.name_it(self)

    def _vector(self, state: Any, vector: torch.Tensor | None, role: str, width: int) -> Any:
        """A pointer to fp32 [width] that this object keeps alive."""
        if vector is None:
            return state.ffi.NULL
        self._keep.append(read_floats(vector, (width,), f"{self.name} ({role})"))
        return state.ffi.cast("float *", self._keep[-1].data_ptr())

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden` [T, H] float32, bfloat16 or float16 -> ids int64 [T, K], weights float32 [T, K], logits float32
        [T, E], with bias, as rounded and capped. Equal keys go by ascending id, a NaN counts as the largest."""
        if isinstance(hidden, torch.Tensor) and torch_ops.is_watched(hidden):
            return torch_ops.router(hidden, self.number)
        return self.compute(hidden)

    def compute(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`forward`, past torch's dispatcher."""
        state, pool = pooled()
        hidden = matrix_input(hidden, self.hidden, self.name)
        tokens = hidden.shape[0]
        ids = torch.empty((tokens, self.choice.top_k), dtype=torch.int64, device="cpu")
        weights = torch.empty((tokens, self.choice.top_k), dtype=torch.float32, device="cpu")
        logits = torch.empty((tokens, self.count), dtype=torch.float32, device="cpu")
        cast = state.ffi.cast
        status = state.lib.kt_router_forward(
            self.handle, pool, cast("void *", hidden.data_ptr()), DTYPES[hidden.dtype], tokens,
            cast("int64_t *", ids.data_ptr()), cast("float *", weights.data_ptr()), cast("float *", logits.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return ids, weights, logits

    __call__ = forward


def matrix_input(hidden: torch.Tensor, cols: int, name: str) -> torch.Tensor:
    """`hidden` [T, cols] as C reads it."""
    hidden = checked_input(hidden, cols, name)
    if hidden.ndim != 2:
        raise NativeError(f"{name}: found hidden {list(hidden.shape)}, expected [T, {cols}].")
    return hidden


def _number(names: dict[str, int], value: Any, field: str, name: str) -> int:
    if value not in names:
        near = did_you_mean(str(value), names)
        raise NativeError(f"{name} ({field}): found {value!r}{near}, expected one of {', '.join(names)}.")
    return names[value]
