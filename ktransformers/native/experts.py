"""The routed experts of a layer on packed bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError, UnsupportedError, did_you_mean
from ktransformers.native import torch_ops
from ktransformers.native.backward import backward_adapted
from ktransformers.native.checks import DTYPES, as_read, checked_input, read_floats, readable_tensor
from ktransformers.native.library import Pool, State, loaded, pooled
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed

ACTIVATIONS = {
    "silu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4, "swigluoai": 5,
}  # fmt: skip
"""Names of kt_activation, in transformers' spelling where it has one; a test holds them to the header."""


@dataclass(frozen=True)
class Glu:
    """What experts do between their products: activation(gate + bias) * (up + bias), and the bias after down.

    `activation`: a key of ACTIVATIONS; "swigluoai" is gate * sigmoid(alpha * gate) * (up + 1). Before the activation
    gate is cut to at most `limit` and up to -limit..limit. Biases: floats [E, I], [E, I], [E, H].
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class Experts:
    """Routed experts on packed bytes. Keeps the Packed weights alive; makes no copy of them.

    Gradients reach hidden states, routing weights and adapters."""

    def __init__(
        self,
        gate: list[Packed] | None,
        up: list[Packed],
        down: list[Packed],
        glu: Glu | str = "silu",
        name: str = "experts",
    ) -> None:
        """E matrices each: gate and up [I, H], down [H, I]; types may differ. `glu`: a Glu, or its activation alone.

        `gate` None: experts without a gate, activation(up). Raises UnsupportedError for a weight type or activation
        without C code, NativeError for what does not fit.
        """
        state = loaded()
        glu = glu if isinstance(glu, Glu) else Glu(glu)
        _check_activation(glu.activation, name)
        roles = {"gate": gate, "up": up, "down": down}
        self.name, self.count = name, _count(roles, name)
        self.matrices, self.glu = (gate, up, down), glu
        self._keep: list[Any] = []
        first, role = (up, "up") if gate is None else (gate, "gate")
        sizes = fill_weight(state, first[0], f"{name}.0.{role}", [], state.ffi.new("kt_weight *"))
        self.intermediate, self.hidden = sizes
        arrays = [self._matrices(state, role, weights) for role, weights in roles.items()]
        out = state.ffi.new("kt_experts **")
        state.check(state.lib.kt_experts_create(self.count, *arrays, self._glu(state, glu), out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_experts_destroy)
        self.number = torch_ops.name_it(self)

    def _matrices(self, state: State, role: str, weights: list[Packed] | None) -> Any:
        """The E weights of a role as C's array, each of the shape that it must have; NULL for None."""
        if weights is None:
            return state.ffi.NULL
        expected = (self.hidden, self.intermediate) if role == "down" else (self.intermediate, self.hidden)
        array = state.ffi.new("kt_weight[]", self.count)
        for e, weight in enumerate(weights):
            subject = f"{self.name}.{e}.{role}"
            shape = fill_weight(state, weight, subject, self._keep, array[e])
            if shape != expected:
                raise NativeError(f"{subject}: found shape {list(shape)}, expected {list(expected)}.")
        return array

    def _glu(self, state: State, glu: Glu) -> Any:
        """`glu` as C's struct."""
        made = state.ffi.new("kt_glu *", {"activation": ACTIVATIONS[glu.activation], "alpha": glu.alpha})
        made.limit = glu.limit
        made.gate_bias = self._bias(state, glu.gate_bias, "gate", self.intermediate)
        made.up_bias = self._bias(state, glu.up_bias, "up", self.intermediate)
        made.down_bias = self._bias(state, glu.down_bias, "down", self.hidden)
        return made

    def _bias(self, state: State, bias: torch.Tensor | None, role: str, width: int) -> Any:
        """A pointer to fp32 [E, width] that this object keeps alive."""
        if bias is None:
            return state.ffi.NULL
        self._keep.append(read_floats(bias, (self.count, width), f"{self.name} ({role} bias)"))
        return state.ffi.cast("float *", self._keep[-1].data_ptr())

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, H] float32, bfloat16 or float16; `ids` [T, K] of an integer dtype; `weights` [T, K] float.

        Returns [T, H] of hidden's dtype. An id outside 0..E-1 is skipped; duplicate ids in a row both count.
        """
        given = all(isinstance(x, torch.Tensor) for x in (hidden, ids, weights))
        if given and torch_ops.is_watched(hidden):
            return torch_ops.experts(hidden, ids, weights, self.number)
        if given and torch_ops.wants_gradient(hidden, weights):
            return torch_ops.adapted_experts(hidden, ids, weights, *torch_ops.NO_ADAPTERS, self.number)
        return self.compute(hidden, ids, weights)

    def compute(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`forward`, past torch's dispatcher."""
        state, pool = pooled()
        hidden, ids, weights = self.arguments(hidden, ids, weights)
        out = torch.empty_like(hidden)
        cast = state.ffi.cast
        status = state.lib.kt_experts_forward(
            self.handle, pool, cast("void *", hidden.data_ptr()), DTYPES[hidden.dtype], hidden.shape[0],
            cast("int64_t *", ids.data_ptr()), ids.shape[1], cast("float *", weights.data_ptr()),
            cast("void *", out.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return out

    def backward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, d_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of hidden [T, H] and of weights [T, K], from that of the result [T, H]."""
        d_hidden, d_weights = backward_adapted(self, hidden, ids, weights, d_out)
        return d_hidden, d_weights

    def place(self, pool: Pool | None = None) -> None:
        """Read all weights in, each row by the NUMA node that will compute it in `pool` (None: the module's own), so
        that pages of a file that are not in memory yet come to lie there. Takes as long as reading the file."""
        state, handle = pooled() if pool is None else (pool._state, pool._pool)
        state.check(state.lib.kt_experts_place(self.handle, handle), self.name)

    def arguments(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three of `forward`, checked and as C reads them."""
        hidden = checked_input(hidden, self.hidden, self.name)
        readable_tensor(ids, f"{self.name} (ids)", "int64 [T, K]", movable=True)
        readable_tensor(weights, f"{self.name} (weights)", "float [T, K]", movable=True)
        if hidden.ndim != 2 or ids.ndim != 2 or ids.shape[0] != hidden.shape[0] or weights.shape != ids.shape:
            raise NativeError(
                f"{self.name}: found hidden {list(hidden.shape)}, ids {list(ids.shape)}, weights "
                f"{list(weights.shape)}; expected [T, {self.hidden}], [T, K], [T, K]."
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise NativeError(f"{self.name}: found ids of {ids.dtype}, expected int64.")
        if not weights.is_floating_point():
            raise NativeError(f"{self.name}: found weights of {weights.dtype}, expected a float dtype.")
        return hidden, as_read(ids, torch.int64), as_read(weights, torch.float32)

    __call__ = forward


def _check_activation(activation: Any, name: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"{name}: activation {activation!r} is not computed in C{did_you_mean(str(activation), ACTIVATIONS)}. "
            f"Known: {', '.join(ACTIVATIONS)}."
        )


def _count(roles: dict[str, Any], name: str) -> int:
    """E, after checking that each role has as many matrices. Only a gate may be missing."""
    for role, weights in roles.items():
        if not isinstance(weights, (list, tuple)) and not (role == "gate" and weights is None):
            raise NativeError(f"{name} ({role}): found {type(weights).__name__}, expected a list of E Packed.")
    counts = {role: len(weights) for role, weights in roles.items() if weights is not None}
    if not counts["up"] or len(set(counts.values())) != 1:
        found = ", ".join(f"{count} {role}" for role, count in counts.items())
        raise NativeError(f"{name}: found {found} matrices, expected E of each.")
    return counts["up"]
