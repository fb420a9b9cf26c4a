"""A block of experts in one call: router, routed experts, shared expert, and their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.checks import DTYPES
from ktransformers.native.library import loaded, pooled
from ktransformers.native.router import matrix_input
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.native.experts import Experts
    from ktransformers.native.router import Router
    from ktransformers.quants.blocks import Packed


class Block:
    """factor * experts(hidden, router(hidden)) + shared_factor * sigmoid(gate(hidden)) * shared(hidden).

    Keeps its parts alive. Weights and sums between them are fp32, and only the result is rounded. No gradients.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: Experts | None = None,
        shared_gate: Packed | None = None,
        factor: float = 1.0,
        shared_factor: float = 1.0,
        name: str = "block",
    ) -> None:
        """`shared`: Experts of one expert, of any intermediate size; `shared_gate` [1, H] or None for no gate."""
        state = loaded()
        if shared_gate is not None and shared is None:
            raise NativeError(
                f"{name}: found a gate of shared experts and no shared experts, expected both or neither."
            )
        if shared is not None and shared.count != 1:
            raise NativeError(f"{name} (shared): found {shared.count} experts, expected one of their joint size.")
        hidden = {"router": router.hidden, "experts": experts.hidden, "shared": (shared or experts).hidden}
        if len(set(hidden.values())) != 1:
            found = ", ".join(f"{size} ({role})" for role, size in hidden.items())
            raise NativeError(f"{name}: found hidden sizes {found}, expected one size.")
        self.name, self.hidden, self.top_k = name, experts.hidden, router.choice.top_k
        self._keep: list[Any] = [router, experts, shared]
        desc = state.ffi.new("kt_moe_desc *", {"factor": factor, "shared_factor": shared_factor})
        desc.router, desc.experts = router.handle, experts.handle
        if shared is not None:
            desc.shared = shared.handle
        if shared_gate is not None:
            w = state.ffi.new("kt_weight *")
            shape = fill_weight(state, shared_gate, f"{name} (shared gate)", self._keep, w)
            if shape != (1, self.hidden):
                raise NativeError(f"{name} (shared gate): found {list(shape)}, expected [1, {self.hidden}].")
            desc.shared_gate = w
        out = state.ffi.new("kt_moe **")
        state.check(state.lib.kt_moe_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_moe_destroy)
        self.number = torch_ops.name_it(self)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, H] float32, bfloat16 or float16 -> [T, H] of the same dtype."""
        if isinstance(hidden, torch.Tensor) and torch_ops.is_watched(hidden):
            return torch_ops.moe(hidden, self.number)
        return self.compute(hidden)

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """`forward`, past torch's dispatcher."""
        return self._run(hidden, None)

    def with_weights(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`compute`, and the router's weights float32 [T, K] too."""
        weights = torch.empty((len(hidden), self.top_k), dtype=torch.float32, device="cpu")
        return self._run(hidden, weights), weights

    def _run(self, hidden: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        state, pool = pooled()
        hidden = matrix_input(hidden, self.hidden, self.name)
        out = torch.empty_like(hidden)
        cast = state.ffi.cast
        status = state.lib.kt_moe_forward(
            self.handle, pool, cast("void *", hidden.data_ptr()), DTYPES[hidden.dtype], hidden.shape[0],
            cast("void *", out.data_ptr()), state.ffi.NULL if weights is None else cast("float *", weights.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return out

    __call__ = forward
