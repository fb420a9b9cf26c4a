"""A checkpoint and a C library without data: what operators are given and call in a simulation.

`FakeWeights` answers as an open checkpoint does, from the model's own shapes; `stand_ins` swaps what computes on data
for what only checks. Everything here is for use inside `fake_devices`.
Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ktransformers import native
from ktransformers.errors import NativeError, WeightError, did_you_mean
from ktransformers.kernels import compiler, words
from ktransformers.kernels.layouts import Layout
from ktransformers.loaders import ExpertWeights
from ktransformers.loaders.base import TensorInfo
from ktransformers.loaders.schemes import ScaledInfo
from ktransformers.models.traits import TRAITS, identity_experts, is_transposed
from ktransformers.native import torch_ops
from ktransformers.operators import experts as experts_module
from ktransformers.operators import experts_packed, hot_experts
from ktransformers.operators.on_gpu import layout_of_infos
from ktransformers.quants.blocks import QUANT_TYPES
from ktransformers.quants.scaled import SCALED_TYPES
from ktransformers.simulator.fake import swapped

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class FakePacked:
    """Stands for a `Packed`. C that computes from it holds `nbytes` bytes (see `_held`), a GPU what `layout` says, or
    else its type."""

    type: Any
    shape: tuple[int, ...]
    nbytes: int
    layout: Layout | None = None

    @property
    def name(self) -> str:
        """The type's, for `layouts.layout_of`."""
        return self.type.name

    def dequantize(self, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device=device)

    def rows(self, start: int, stop: int) -> "FakePacked":
        count, *rest = self.shape
        return FakePacked(self.type, (stop - start, *rest), self.nbytes * (stop - start) // count)

    def dequantize_into(self, out: Tensor) -> None:
        if tuple(out.shape) != tuple(self.shape):
            raise WeightError(f"Cannot dequantize {list(self.shape)} into {list(out.shape)}.")


Size = Callable[[str, tuple[int, ...], torch.dtype], tuple[str, int]]
"""(a tensor's name, shape and dtype in the model) -> (name of its stored type, see quants, and its bytes)."""
Form = Callable[[str, tuple[int, ...], torch.dtype], Layout | None]
"""The same -> the packed form that its bits have on a GPU."""


def _dense(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, int]:
    kind = next((kind.name for kind in QUANT_TYPES.values() if kind.torch_dtype is dtype), "F32")
    return kind, math.prod(shape) * dtype.itemsize


class FakeWeights:
    """Stands in for `ktransformers.loaders.ModelWeights`.

    Args:
        model: on the meta device, before operators are in it.
        stored: the bound weights of a real checkpoint, whose types and bytes count.
        size: without a checkpoint, what tells a tensor's type and bytes by (name, shape, dtype); None: every tensor is
            stored as the model has it.
        form: likewise of types whose scales lie apart, what tells their packed form on a GPU; None: they have none.
    """

    format = "fake"
    path = "fake weights"

    def __init__(
        self, model: nn.Module, stored: Any = None, size: Size | None = None, form: Form | None = None
    ) -> None:
        self.stored, self.size, self.form = stored, size or _dense, form or (lambda name, shape, dtype: None)
        self._tensors = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        self._experts = {name: _Layout.of(m) for name, m in model.named_modules() if TRAITS["experts"](m)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._known(name)[0]

    def _known(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name not in self._tensors:
            raise WeightError(f"The model has no weights for {name}{did_you_mean(name, self._tensors)}.")
        return self._tensors[name]

    def infos(self, name: str) -> list[Any]:
        if self.stored:
            return self.stored.infos(name)
        kind, shape, layout = self._type(name), self.shape(name), self._layout(name)
        plain = TensorInfo(name, shape, kind, self.nbytes(name), Path(self.path), 0)
        if layout is None or kind.name not in SCALED_TYPES:
            return [plain]
        apart = {"codes": plain, "scales": plain, "scale_rows": 1, "scale_cols": layout.group or shape[-1]}
        zeros = plain if layout.minimum == "ZEROS" else None
        return [ScaledInfo(**vars(plain), **apart, scale_type=layout.scale, zeros=zeros)]

    def _layout(self, name: str) -> Layout | None:
        """The packed form of a tensor on a GPU."""
        return layout_of_infos(self.stored.infos(name)) if self.stored else self.form(name, *self._known(name))

    def _type(self, name: str) -> Any:
        kind = self.size(name, *self._known(name))[0]
        return QUANT_TYPES.get(kind) or SCALED_TYPES[kind]

    def quant_type(self, name: str) -> str:
        return self.stored.quant_type(name) if self.stored else self._type(name).name

    def methods(self, name: str) -> list[str]:
        return self.stored.methods(name) if self.stored else [self.quant_type(name)]

    def is_stored_as(self, name: str, method: str) -> bool:
        return self.stored is None or self.stored.is_stored_as(name, method)

    def nbytes(self, name: str) -> int:
        """Bytes of the stored tensor."""
        return self.stored.nbytes(name) if self.stored else self.size(name, *self._known(name))[1]

    def tensor(self, name: str, device: Any = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        shape, own = self._known(name)
        return torch.empty(shape, device=device, dtype=dtype or own)

    def can_pack(self, name: str) -> bool:
        return self.stored.can_pack(name) if self.stored else self.has(name)

    def packed(self, name: str) -> FakePacked:
        return FakePacked(self._type(name), self._known(name)[0], self.nbytes(name), self._layout(name))

    def same(self, name: str, other: str) -> bool:
        return self.stored is None or self.stored.same(name, other)

    def has_experts(self, prefix: str) -> bool:
        return prefix in self._experts

    def experts_problem(self, prefix: str) -> str:
        return self.stored.experts_problem(prefix) if self.stored else ""

    def experts(self, prefix: str) -> ExpertWeights:
        """As `ModelWeights.experts`; the matrices of one kind are all alike."""
        if prefix not in self._experts:
            raise WeightError(f"{prefix}: found no experts{did_you_mean(prefix, self._experts)}.")
        layout = self._experts[prefix]
        gated = layout.first == "gate_up_proj"
        up = self._matrices(f"{prefix}.{layout.first}", layout.count, layout.intermediate, layout.hidden, 1 + gated)
        gate = self._matrices(f"{prefix}.gate_up_proj", layout.count, layout.intermediate, layout.hidden, 2)
        down = self._matrices(f"{prefix}.down_proj", layout.count, layout.hidden, layout.intermediate, 1)
        biases = {}
        if self.has(f"{prefix}.{layout.first}_bias"):
            widths = {"gate_bias": layout.intermediate, "up_bias": layout.intermediate, "down_bias": layout.hidden}
            biases = {name: torch.empty(layout.count, width, device="cpu") for name, width in widths.items()}
        return ExpertWeights(gate if gated else None, up, down, **biases)

    def _matrices(self, name: str, count: int, rows: int, columns: int, parts: int) -> list[FakePacked]:
        """`count` matrices, which `name` holds `parts` times."""
        if not self.has(name):
            return []
        kind, nbytes, layout = self._type(name), self.nbytes(name) // (count * parts), self._layout(name)
        return [FakePacked(kind, (rows, columns), nbytes, layout) for _ in range(count)]

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class _Layout:
    """How an experts module's weights lie: what multiplies the input, and the sizes."""

    first: str
    count: int
    intermediate: int
    hidden: int

    @classmethod
    def of(cls, experts: nn.Module) -> "_Layout":
        sizes = tuple(experts.down_proj.shape[1:])
        hidden, intermediate = reversed(sizes) if is_transposed(experts) else sizes
        first = experts_module.first_projection(experts)
        return cls(first, len(getattr(experts, first)) - identity_experts(experts), intermediate, hidden)


# --- the C library --------------------------------------------------------------------------------------------------


class _Linear:
    """`native.Linear`: takes what that takes, refuses what that refuses, computes nothing."""

    def __init__(self, weight: Any, bias: Tensor | None = None, name: str = "linear") -> None:
        self.weight, self.bias, self.name, self.held = weight, bias, name, _held([weight])
        if len(weight.shape) != 2:
            raise NativeError(f"{name}: found weight {list(weight.shape)}, expected a matrix [N, K].")
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise NativeError(f"{name} (bias): found {list(bias.shape)}, expected [{self.out_features}].")
        self.number = torch_ops.name_it(self)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_features, self.name)
        if torch_ops.wants_gradient(x):
            return torch_ops.linear(x, self.number)
        return torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device="cpu")

    __call__ = forward


class _Embedding:
    """`native.Embedding`, likewise."""

    def __init__(self, weight: Any, name: str = "embedding") -> None:
        self.weight, self.name, self.held = weight, name, _held([weight])
        self.count, self.hidden = weight.shape

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        if ids.device.type != "cpu" or ids.is_floating_point():
            raise NativeError(f"{self.name}: found ids of {ids.dtype} on {ids.device}, expected int64 on the cpu.")
        return torch.empty((*ids.shape, self.hidden), dtype=dtype, device="cpu")


class _Experts:
    """`native.Experts`, likewise."""

    def __init__(
        self, gate: list | None, up: list, down: list, glu: native.Glu | str = "silu", name: str = "experts"
    ) -> None:
        self.name, self.glu, self.held = name, glu, _held([*(gate or ()), *up, *down])
        self.count = len(up)
        self.intermediate, self.hidden = up[0].shape
        self.number = torch_ops.name_it(self)
        if len(down) != self.count or tuple(down[0].shape) != (self.hidden, self.intermediate):
            raise NativeError(
                f"{name}: found {self.count} up {list(up[0].shape)} and {len(down)} down {list(down[0].shape)}, "
                "expected [I, H] and [H, I] for each expert."
            )

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        _check_input(hidden, self.hidden, self.name)
        if hidden.dim() != 2 or ids.dim() != 2 or len(ids) != len(hidden) or weights.shape != ids.shape:
            raise NativeError(
                f"{self.name}: found hidden {list(hidden.shape)}, ids {list(ids.shape)}, weights "
                f"{list(weights.shape)}; expected [T, {self.hidden}], [T, K], [T, K]."
            )
        if ids.is_floating_point() or ids.dtype == torch.bool or not weights.is_floating_point():
            raise NativeError(f"{self.name}: found ids of {ids.dtype}, weights of {weights.dtype}.")
        if torch_ops.wants_gradient(hidden, weights):
            return torch_ops.experts(hidden, ids, weights, self.number)
        return torch.empty_like(hidden)

    __call__ = forward


def _held(weights: list[Any]) -> Tensor:
    """The bytes of `weights`, each once, as one tensor: what a handle keeps in memory."""
    each = {id(weight): weight.nbytes for weight in weights}
    return torch.empty(sum(each.values()), dtype=torch.uint8, device="cpu")


def _check_input(x: Tensor, width: int, name: str) -> None:
    if x.device.type != "cpu":
        raise NativeError(f"{name}: found input on {x.device}, expected it on the cpu.")
    if x.dtype not in _COMPUTED:
        raise NativeError(f"{name}: found input of {x.dtype}, expected float32, bfloat16 or float16.")
    if x.dim() < 1 or x.shape[-1] != width:
        raise NativeError(f"{name}: found input {list(x.shape)}, expected last dimension {width}.")


def _shared_evenly(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`KExpertsTorch.forward` where nobody knows the choice: every expert has as many tokens, so one stands for all."""
    x, ids = hidden.to(self.down.device, self.down.dtype), ids.to(self.down.device)
    count = len(self.down) if self.slots is None else len(self.slots) - 1  # those of other parts have theirs too
    share = -(-ids.numel() // count)
    pairs = ids.reshape(-1).argsort(stable=True)[:share]
    tokens = pairs // ids.shape[1]
    scale = weights.to(x.device).reshape(-1, 1)
    out = torch.zeros_like(x)
    y = self._expert(0, x[tokens]) * scale[pairs]
    out.index_add_(0, tokens, y.to(out.dtype))
    return out.to(hidden.device, hidden.dtype)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside, the C library, kernels and the torch experts check their operands and return empty results.

    It works without the C library built. Process-wide, so not while a model computes in another thread.
    """
    gating_of = experts_module.gating_of

    def with_numbers(experts: nn.Module) -> Any:
        """A gating is recognized by what it computes: that needs real tensors."""
        with unset_fake_temporarily():
            return gating_of(experts)

    with (
        swapped(native, "Linear", _Linear),
        swapped(native, "Embedding", _Embedding),
        swapped(native, "Experts", _Experts),
        swapped(native, "available", lambda: True),
        swapped(native, "nodes", lambda: [1]),
        swapped(compiler, "why_not", lambda device: "" if device.type == "cuda" else "it is no GPU"),
        swapped(words, "write", lambda words, weight, row=0: None),
        swapped(words.Words, "expert", lambda self, e: self),  # which is only asked for to be written to
        swapped(hot_experts, "some", lambda mask: True),
        swapped(experts_module, "gating_of", with_numbers),
        swapped(experts_packed, "gating_of", with_numbers),
        swapped(experts_module.KExpertsTorch, "forward", _shared_evenly),
    ):
        yield
