"""Linear layers: the wrapper that a rule names, and its inner operators.

`KTransformersLinear` holds inner operators, each of which knows one way of computing; linear_packed.py has those for
packed weights on a GPU. Where one cannot compute, another stands in for it, see inner_ops.py.
Letters: N output features, K input features.
"""

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransformers import native
from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.loaders import WeightSource
from ktransformers.models.traits import is_linear
from ktransformers.operators.adapters import beside, meet_peft
from ktransformers.operators.base_operator import BaseInjectedModule, InferenceState, warn_once
from ktransformers.operators.inner_base import KLinearBase, Weight, weight_and_bias
from ktransformers.operators.inner_ops import (
    DENSE,
    OBSOLETE_OPS,
    InnerOperator,
    StagedOperator,
    dtype_problem,
    given,
    is_cpu,
    no_kernels,
    op_problem,
    resolve_op,
    stored_problem,
)
from ktransformers.operators.linear_packed import KLinearFP8, KLinearMarlin, KLinearPacked
from ktransformers.operators.on_gpu import GROUP_SIZE, NUM_BITS, quantizing_problems
from ktransformers.operators.packed_weight import PackedWeight, ReadWeight
from ktransformers.operators.trained import untrainable
from ktransformers.quants.blocks import Packed, quant_type


class KLinearTorch(KLinearBase, nn.Module):
    """Dense weight on any device, computed by torch. Parameters `weight` and `bias` in the model's dtype."""

    def __init__(self, key: str, gguf_loader: WeightSource, config: Any, orig_module: nn.Module, device: Any = None):
        super().__init__(key, gguf_loader, config, orig_module, device)
        weight = getattr(orig_module, "weight", None)
        self.dtype = torch.get_default_dtype() if weight is None else weight.dtype
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def load(self, w: Weight = None, device: Any = None) -> None:
        device = self.device if device is None else device
        if w is None:
            w = self.load_weight(device=device, dtype=self.dtype)
        weight, bias = weight_and_bias(w, self.key)
        self.weight = nn.Parameter(weight.detach().to(device, self.dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device, self.dtype), requires_grad=False)

    def unload(self) -> None:
        self.weight = self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.linear(x.to(weight.device, weight.dtype), weight, self.bias).to(x.device, x.dtype)


class KLinearCPUInfer(KLinearBase):
    """The checkpoint's own bytes, computed by the C library. Not a module: `.to()` has nothing to move."""

    cpu_only = True

    def __init__(self, key: str, gguf_loader: WeightSource, config: Any, orig_module: nn.Module, device: Any = None):
        super().__init__(key, gguf_loader, config, orig_module, device)
        self.linear: native.Linear | None = None
        self.dtype = getattr(getattr(orig_module, "weight", None), "dtype", None) or torch.get_default_dtype()

    @classmethod
    def problem(cls, key: str, weights: WeightSource | None, dtype: torch.dtype | None = None) -> str:
        """Say why the C library cannot compute this weight in a model of `dtype`, or return ``""``."""
        if not native.available():
            return f"{native.NOT_BUILT}; KLinearTorch needs none"
        if problem := dtype_problem(dtype, "KLinearTorch"):
            return problem
        if weights is None:
            return ""
        name = f"{key}.weight"
        if not weights.can_pack(name):
            return f"{name} is not stored as one matrix in the checkpoint; use KLinearTorch"
        return stored_problem(weights, [name], "KLinearTorch")

    def load(self, w: Weight = None, device: Any = None) -> None:
        if w is not None:
            raise WeightError(
                f"{self.key}: KLinearCPUInfer computes from the checkpoint; load it without `w`."
            )
        bias = self.gguf_loader.tensor(f"{self.key}.bias", dtype=torch.float32) if self.has_bias else None
        self.linear = native.Linear(self.gguf_loader.packed(f"{self.key}.weight"), bias, name=self.key)

    def unload(self) -> None:
        self.linear = None

    def shown_weight(self, name: str, instead: str) -> Any:
        if self.linear is None:
            return PackedWeight(name, (self.out_features, self.in_features), self.dtype, "cpu", instead)
        return ReadWeight(name, self.linear.weight, self.dtype, instead)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear.forward(x.cpu()).to(x.device)


LINEAR_MAP: dict[str, type[InnerOperator]] = {
    "KLinearTorch": KLinearTorch, "KLinearCPUInfer": KLinearCPUInfer,
    "KLinearMarlin": KLinearMarlin, "VLinearMarlin": KLinearMarlin, "KLinearFP8": KLinearFP8,
}  # fmt: skip
"""Names a rule may give as `generate_op` and `prefill_op`; authors may add theirs."""


class KTransformersLinear(StagedOperator, nn.Linear):
    """A linear layer that computes with the inner operator a rule names (see `StagedOperator`).

    Without a name the device decides: on the CPU `KLinearCPUInfer` for weights that the C library computes, on a GPU
    `KLinearPacked` for weights that have a packed form there, else `KLinearTorch`. A rule that names `KLinearMarlin`
    has all other weights quantized, to `num_bits` with a scale for each `group_size` columns. The input may be on any
    device; the result is on `out_device`, or where the input was. It is an `nn.Linear`, for that is what PEFT puts
    adapters on.
    """

    dense = KLinearTorch

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        generate_device: str = "cuda",
        generate_op: str | None = None,
        prefill_device: str = "cuda",
        prefill_op: str | None = None,
        out_device: str | None = None,
        num_bits: int = NUM_BITS,
        group_size: int = GROUP_SIZE,
    ):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device)
        self.out_device, self.quantizing = out_device, (num_bits, group_size)
        self.adapters: tuple[nn.Module, list[str]] | None = None  # set by those around a call, see adapters.py
        generate = self._op(generate_op, generate_device)
        self.hold(generate, self._op(prefill_op, prefill_device) if given(prefill_op) else None)
        self.in_features, self.out_features = self.active.in_features, self.active.out_features

    def _op(self, name: str | None, device: str) -> tuple[type[InnerOperator], torch.device]:
        today = resolve_op(name, device) if given(name) else None
        if today is not None and (today == OBSOLETE_OPS.get(name, name) or today != "KLinearCPUInfer"):
            return LINEAR_MAP[today], torch.device(device)
        # Nothing named, or a GPU operator that gave way: the best this device has for this weight.
        if not is_cpu(device):
            if no_kernels(device):
                return KLinearTorch, torch.device(device)
            packs = KLinearPacked.keeps(self.key, self.gguf_loader)
            if not packs and (types := _quantized(self.key, self.gguf_loader)):
                warn_once(f"KTransformersLinear on {device}: {types} has no packed form there; KLinearTorch {DENSE}")
            return (KLinearPacked if packs else KLinearTorch), torch.device(device)
        dtype = getattr(getattr(self.orig_module, "weight", None), "dtype", None)
        usable = not KLinearCPUInfer.problem(self.key, self.gguf_loader, dtype)
        return (KLinearCPUInfer if usable else KLinearTorch), torch.device(device)

    def _make(self, operator: type[InnerOperator], device: Any) -> InnerOperator:
        inner = super()._make(operator, device)
        if isinstance(inner, KLinearMarlin):
            inner.quantizing = self.quantizing
        return inner

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        if problem := _not_linear(orig_module):
            return [f"{cls.__name__} {problem}"]
        problems = []
        for stage in ("generate", "prefill"):
            name, device = kwargs.get(f"{stage}_op"), kwargs.get(f"{stage}_device") or "cuda"
            problem = op_problem(f"{stage}_op", name, device, LINEAR_MAP)
            if not problem and OBSOLETE_OPS.get(name, name) == "KLinearCPUInfer":
                reason = KLinearCPUInfer.problem(key, weights, orig_module.weight.dtype)
                problem = reason and f"{stage}_op: {reason}"
            problems += [problem] if problem else []
        return problems + quantizing_problems(kwargs)

    def load(self, w: Weight = None, mode: InferenceState = InferenceState.GENERATE) -> None:
        super().load(w, mode)
        self._show_parameters()

    def unload(self) -> None:
        super().unload()
        self._show_parameters()

    def _show_parameters(self) -> None:
        """Share the inner operator's parameters: named as nn.Linear names them, and moved by `.to()`."""
        self.__dict__["_parameters"] = self.active._parameters if isinstance(self.active, nn.Module) else {}

    def __getattr__(self, name: str) -> Any:
        """Called for what is not found: `weight` and `bias` while the inner operator has no dense ones.

        The weight shows its shape, dtype and device, by which PEFT puts an adapter beside it."""
        inner = self.active if name in ("weight", "bias") and "_inner" in self.__dict__ else None
        if not isinstance(inner, (KLinearCPUInfer, KLinearPacked)):
            return super().__getattr__(name)
        instead = "name KLinearTorch for it in the rule, or leave it out"
        if name == "weight":
            return inner.shown_weight(f"{self.key}.weight", instead)
        if not inner.has_bias:
            return None  # as nn.Linear
        raise AttributeError(f"{self.key}: computes from packed bytes and has no dense {name}; {instead}")

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """True makes a packed weight a dense one, to be trained; see trained.py."""
        if requires_grad and not isinstance(self.active, nn.Module):
            if problem := untrainable(self):
                raise UnsupportedError(f"{problem}.")
            self.become(KLinearTorch)
            self._show_parameters()
        return super().requires_grad_(requires_grad)

    def bare(self) -> nn.Module:
        made = copy.copy(self.orig_module)
        made._parameters = self.orig_module._parameters | self._parameters
        return made

    def named_parameters(self, prefix: str = "", recurse: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Dense ones; and a packed weight to one who asks for this module's own, as PEFT does for what can have an
        adapter. See adapters.py."""
        yield from super().named_parameters(prefix, recurse, *args, **kwargs)
        if not recurse and "peft" in sys.modules:
            meet_peft()
            if "weight" not in self._parameters and isinstance(self.active, (KLinearCPUInfer, KLinearPacked)):
                yield "weight", self.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.active.forward(x)
        if self.adapters is not None:
            out = beside(out, x, *self.adapters)
        return out if self.out_device is None else out.to(self.out_device)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features} -> {self.out_features}"
        return f"{sizes}, {type(self.active).__name__} on {self.generate_device}{getattr(self.active, 'form', '')}"


def _quantized(key: str, weights: WeightSource | None) -> str:
    """The types of a weight that is stored in quantized ones, or ``""``."""
    name = f"{key}.weight"
    if weights is None or not weights.has(name):
        return ""
    return "+".join(dict.fromkeys(i.type.name for i in weights.infos(name) if i.type.torch_dtype is None))


def packed_of(linear: nn.Module | None) -> tuple[Packed, Tensor | None] | None:
    """The weight [N, K] as the C library reads it, without a copy, and the bias [N]; None where it is not such memory:
    on another device, of another dtype, or in a module that does more than multiply."""
    if isinstance(linear, KTransformersLinear):
        inner = linear.active
        if isinstance(inner, KLinearCPUInfer):
            return None if inner.linear is None else (inner.linear.weight, inner.linear.bias)
        if not isinstance(inner, KLinearTorch) or linear.out_device is not None and not is_cpu(linear.out_device):
            return None
        weight, bias = inner.weight, inner.bias
    elif isinstance(linear, nn.Linear) and is_linear(linear):
        weight, bias = linear.weight, linear.bias
    else:
        return None
    packed = packed_dense(weight)
    return None if packed is None else (packed, bias)


def packed_dense(weight: Tensor | None) -> Packed | None:
    """A dense matrix as the C library reads it; None where it is elsewhere, not in order, or of another dtype."""
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}.get(getattr(weight, "dtype", None))
    if name is None or weight.device.type != "cpu" or not weight.is_contiguous() or type(weight.data) is not Tensor:
        return None
    return Packed(weight.detach().reshape(-1).view(torch.uint8), quant_type(name), tuple(weight.shape))


def _not_linear(module: nn.Module) -> str:
    """Say that `module` is no linear layer, or more than one (routers may subclass it), or return ``""``."""
    if is_linear(module):
        return ""
    more = ", which computes more than that" if isinstance(module, nn.Linear) else ""
    return f"replaces torch.nn.Linear, found {type(module).__name__}{more}"


class LinearTorchInject(BaseInjectedModule, KLinearBase):
    """The tutorial's operator: a dense transposed weight and a matrix product, on one device.

    `my_param` shows how a rule hands an operator a parameter of its own; it changes nothing.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        generate_device: str = "cuda",
        my_param: bool = True,
        **kwargs: Any,
    ):
        super().__init__(key, gguf_loader, config, orig_module, generate_device, **kwargs)
        KLinearBase.__init__(self)
        self.my_param = my_param
        self.dtype = torch.get_default_dtype()
        self.w: Tensor | None = None  # [K, N]
        self.bias: Tensor | None = None

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        problem = _not_linear(orig_module)
        return [f"{cls.__name__} {problem}"] if problem else []

    def load(self, w: Weight = None, device: Any = None) -> None:
        device = self.device if device is None else device
        if w is None:
            w = self.load_weight(device=device)
        weight, bias = weight_and_bias(w, self.key)
        self.w = weight.detach().to(device, self.dtype).T
        self.bias = None if bias is None else bias.detach().to(device, self.dtype)

    def unload(self) -> None:
        self.w = self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.device, self.dtype) @ self.w
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.device, x.dtype)
