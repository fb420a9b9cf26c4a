"""Routed experts: the wrapper that a rule names, and its inner operators. Routing is in moe.py.

The contract is that of transformers 5: experts(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) gives
[T, H]. An index outside 0..E-1 is skipped (expert parallelism marks experts of other ranks so), and an expert
that a row names twice counts twice.
Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ktransformers import native
from ktransformers.errors import did_you_mean
from ktransformers.operators.base_operator import forward_only, tell_once
from ktransformers.operators.inner_ops import (
    StagedOperator,
    dtype_problem,
    final_name,
    given,
    op_problem,
    resolve_op,
)
from ktransformers.operators.moe import (  # noqa: F401  rule files name the blocks as operators.experts.*
    KDeepseekV2MoE,
    KDeepseekV3MoE,
    KMistralSparseMoEBlock,
    KQwen2MoeSparseMoeBlock,
    KQwen3MoeSparseMoeBlock,
)

BACKENDS = ("llamafile", "AMXBF16", "AMXInt8")
"""What rule files may name as `backend` of the CPU experts. All mean the C library of this package."""


class KExpertsBase:
    """An inner operator for the experts under `key`: `load` reads them, `unload` gives the memory back."""

    def __init__(self, key: str, gguf_loader: Any, config: Any, orig_module: nn.Module, device: Any = "cpu"):
        self.key, self.gguf_loader, self.config = key, gguf_loader, config
        self.orig_module, self.device = orig_module, device

    def load(self, w: Any = None, device: Any = None) -> None:
        raise NotImplementedError

    def unload(self) -> None:
        raise NotImplementedError

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], ids int64 [T, K], weights float [T, K] -> [T, H], dtype and device as `hidden`."""
        raise NotImplementedError


class KExpertsCPU(KExpertsBase):
    """The checkpoint's own bytes, computed by the C library: no conversion, and no copy of the weights."""

    cpu_only = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.experts: native.Experts | None = None

    @classmethod
    def problem(
        cls, key: str, activation: str | None, weights: Any, dtype: torch.dtype | None = None
    ) -> str:
        """Say why the C library cannot compute these experts in a model of `dtype`, or return ``""``."""
        if not native.available():
            return f"{native.NOT_BUILT}; KExpertsTorch needs none"
        if problem := dtype_problem(dtype, "KExpertsTorch"):
            return problem
        if activation not in native.ACTIVATIONS:
            return f"the C library does not compute the activation {activation!r}; use KExpertsTorch"
        if weights is None or not weights.has_experts(key):
            return ""
        kinds = [weights.quant_type(f"{key}.{name}") for name in ("gate_up_proj", "down_proj")]
        if not (unknown := sorted(set("+".join(kinds).split("+")) - native.SUPPORTED_TYPES)):
            return ""
        known = ", ".join(sorted(native.SUPPORTED_TYPES))
        return f"the C library does not compute {', '.join(unknown)} (it does {known}); use KExpertsTorch"

    def load(self, w: Any = None, device: Any = None) -> None:
        packed, activation = self.gguf_loader.experts(self.key), activation_of(self.orig_module)
        self.experts = native.Experts(packed.gate, packed.up, packed.down, activation, name=self.key)

    def unload(self) -> None:
        self.experts = None

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        def compute(hidden: Tensor, weights: Tensor) -> Tensor:
            return self.experts.forward(hidden.cpu(), ids.cpu(), weights.cpu()).to(hidden.device)

        return forward_only(compute, f"{self.key} (KExpertsCPU)", hidden, weights)


class KExpertsTorch(KExpertsBase):
    """Dense weights on any device, computed by torch expert by expert. Dequantized: mind the memory.

    Plain tensors in the model's dtype, not parameters: `.to()` does not drag them to another device.
    """

    gate_up: Tensor | None = None  # [E, 2I, H], gate rows first
    down: Tensor | None = None  # [E, H, I]

    def load(self, w: Any = None, device: Any = None) -> None:
        device = self.device if device is None else device
        read = self.gguf_loader.tensor
        dtype = self.orig_module.gate_up_proj.dtype
        self.gate_up = read(f"{self.key}.gate_up_proj", device=device, dtype=dtype)
        self.down = read(f"{self.key}.down_proj", device=device, dtype=dtype)
        self.act_fn = self.orig_module.act_fn

    def unload(self) -> None:
        self.gate_up = self.down = None

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sort the T*K pairs by expert, so that every expert sees its tokens as one matrix."""
        x, ids = hidden.to(self.down.device, self.down.dtype), ids.to(self.down.device)
        n_experts = self.down.shape[0]
        flat = ids.reshape(-1)  # pair p is slot p % K of token p // K
        flat = flat.where((flat >= 0) & (flat < n_experts), n_experts)  # what is to be skipped sorts last
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=n_experts + 1)[:n_experts].tolist()
        scale = weights.to(x.device).reshape(-1, 1)
        out = torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            pairs = order[start : start + count]
            start += count
            tokens = pairs // ids.shape[1]
            gate, up = F.linear(x[tokens], self.gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.down[expert]) * scale[pairs]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out.to(hidden.device, hidden.dtype)


EXPERTS_MAP: dict[str, type] = {"KExpertsTorch": KExpertsTorch, "KExpertsCPU": KExpertsCPU}
"""Names a rule may give as `generate_op` and `prefill_op`; authors may add theirs."""


class KTransformersExperts(StagedOperator):
    """Routed experts, computed by the inner operator a rule names (see `StagedOperator`).

    Their weights are neither parameters nor buffers. The result is on `out_device`, or where the input was.
    `backend` is accepted from older rule files; see `BACKENDS`.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "cuda",
        prefill_op: str | None = None,
        generate_device: str = "cpu",
        generate_op: str | None = "KExpertsCPU",
        out_device: str | None = None,
        backend: str | None = None,
    ):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device)
        self.out_device = out_device
        if backend in BACKENDS[1:]:
            tell_once(
                f"backend {backend!r}: the C library picks kernels for this CPU, and converts no weights"
            )
        generate = self._op(given(generate_op) or "KExpertsCPU", generate_device)
        self.hold(generate, self._op(prefill_op, prefill_device) if given(prefill_op) else None)

    @staticmethod
    def _op(name: str, device: str) -> tuple[type, torch.device]:
        return EXPERTS_MAP[resolve_op(name, device)], torch.device(device)

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: Any = None
    ) -> list[str]:
        if problem := layout_problem(orig_module):
            return [problem]
        problems = []
        named = {
            "generate": given(kwargs.get("generate_op")) or "KExpertsCPU",
            "prefill": given(kwargs.get("prefill_op")),
        }
        fallback = {"generate": "cpu", "prefill": "cuda"}
        for stage, name in named.items():
            device = kwargs.get(f"{stage}_device") or fallback[stage]
            if problem := op_problem(f"{stage}_op", name, device, EXPERTS_MAP):
                problems.append(problem)
            elif name is not None and final_name(name) == "KExpertsCPU":
                activation, dtype = activation_of(orig_module), orig_module.down_proj.dtype
                if problem := KExpertsCPU.problem(key, activation, weights, dtype):
                    problems.append(f"{stage}_op: {problem}")
        backend = kwargs.get("backend")
        if backend is not None and backend not in BACKENDS:
            hint = did_you_mean(str(backend), BACKENDS)
            problems.append(f"backend: {backend!r} unknown{hint}; known: {', '.join(BACKENDS)}")
        return problems

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = self.active.forward(hidden_states, top_k_index, top_k_weights)
        return out if self.out_device is None else out.to(self.out_device)

    def extra_repr(self) -> str:
        return f"{type(self.active).__name__} on {self.generate_device}"


def activation_of(experts: nn.Module) -> str | None:
    """The name of the experts' activation as configs spell it, such as ``silu``, or None."""
    return next((name for name in ACT2FN if type(ACT2FN[name]) is type(experts.act_fn)), None)


def layout_problem(experts: nn.Module) -> str:
    """Say why `experts` is not laid out as in most families, or ``""``."""
    found = type(experts).__name__
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return f"found {found}, expected an experts module with gate_up_proj [E, 2I, H], down_proj [E, H, I]"
    if odd := _oddity(experts, gate_up, down):
        refused = "which this version does not compute; leave it to transformers (class: default)"
        return f"{found} has {odd}, {refused}"
    return ""


def _oddity(experts: nn.Module, gate_up: Tensor, down: Tensor) -> str:
    """The first thing about `experts` that the inner operators do not compute, or ``""``."""
    for word, expected in _LAYOUT.items():
        if getattr(experts, word, expected) is not expected:
            return f"{word} = {not expected}"
    if gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return f"gate_up_proj {list(gate_up.shape)} with down_proj {list(down.shape)}"
    gating = getattr(type(experts), "_apply_gate", None)
    if gating is not None and gating.__name__ != "_default_apply_gate":
        return "a gating of its own (_apply_gate)"
    return "" if hasattr(experts, "act_fn") else "no act_fn"


_LAYOUT = {
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "has_gate": True,
}
"""What transformers' decorator `use_experts_implementation` says of most families."""
