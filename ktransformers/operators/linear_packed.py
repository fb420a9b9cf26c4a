"""A linear layer on packed weights on a GPU, computed by the kernels of kernels/linear.py.

A weight keeps the bits that it is published in, where these have a packed form; others are quantized while loading, as
upstream's operator of this name does with all, where a rule asks for that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import linear, words
from ktransformers.kernels.compiler import too_old
from ktransformers.kernels.floats import Loss
from ktransformers.loaders import WeightSource
from ktransformers.native import torch_ops
from ktransformers.operators.inner_base import KLinearBase, Weight, weight_and_bias
from ktransformers.operators.on_gpu import (
    GROUP_SIZE,
    NUM_BITS,
    Workspace,
    as_packed,
    computable,
    form_of,
    layout_of_infos,
    report,
)
from ktransformers.operators.packed_weight import PackedWeight


class KLinearPacked(KLinearBase):
    """A weight that has a packed form of its own, on a GPU; of another, `load` raises UnsupportedError.

    What a GPU takes where no rule names an operator. Not a module: `.to()` has nothing to move.
    """

    on_gpu = True
    quantizing: tuple[int, int] | None = None
    """To how many bits, and with a scale for how many columns, other weights are quantized; None: they are not."""

    def __init__(self, key: str, gguf_loader: WeightSource, config: Any, orig_module: nn.Module, device: Any = None):
        super().__init__(key, gguf_loader, config, orig_module, device)
        weight = getattr(orig_module, "weight", None)
        self.name, self.dtype = key, torch.get_default_dtype() if weight is None else weight.dtype
        self.words: words.Words | None = None
        self.bias: Tensor | None = None
        self.lost: float | None = None
        self.number = torch_ops.name_it(self)

    def shown_weight(self, name: str, instead: str) -> PackedWeight:
        """What the layer shows as its weight: where it is, and no numbers."""
        return PackedWeight(name, (self.out_features, self.in_features), self.dtype, self.device, instead)

    @classmethod
    def keeps(cls, key: str, weights: WeightSource | None) -> bool:
        """Whether the checkpoint's weight has a packed form of its own."""
        name = f"{key}.weight"
        if weights is None or not weights.has(name) or not weights.can_pack(name):
            return False
        layout = layout_of_infos(weights.infos(name))
        return layout is not None and layout.takes(weights.shape(name)[-1])

    def load(self, w: Weight = None, device: Any = None) -> None:
        device = torch.device(self.device if device is None else device)
        if problem := too_old(device):
            raise UnsupportedError(problem)
        stored, bias = self._stored(device) if w is None else weight_and_bias(w, self.key)
        self.check_shape(stored.shape, self.key)
        loss = Loss()
        self.words = words.from_packed(as_packed(stored, self.dtype, self.quantizing, loss), device)
        self.bias = None if bias is None else bias.detach().to(device, self.dtype)
        self.lost = report(self, loss)
        self.workspace = Workspace.of(self.gguf_loader, self.words.device)
        if type(self.words.scales) is Tensor:  # a simulation's have no device that could be asked
            self.workspace.take(linear.most_workspace(self.words, computable(self.dtype)))

    def _stored(self, device: torch.device) -> tuple[Any, Tensor | None]:
        """The weight in its published bytes, or as numbers where it is made of several tensors; and the bias."""
        name, bias = f"{self.key}.weight", None
        if self.has_bias:
            bias = self.gguf_loader.tensor(f"{self.key}.bias", device=device, dtype=self.dtype)
        if self.gguf_loader.can_pack(name):
            return self.gguf_loader.packed(name), bias
        return self.gguf_loader.tensor(name, device=device, dtype=self.dtype), bias

    def unload(self) -> None:
        self.words = self.bias = self.lost = None

    @property
    def form(self) -> str:
        """For a line about it: its packed form."""
        return "" if self.words is None else form_of(self.words, self.lost)

    def forward(self, x: Tensor) -> Tensor:
        there = x.to(self.words.device, computable(x.dtype))
        wanted = torch.is_grad_enabled() and there.requires_grad
        out = WithGradient.apply(there, self.words, self.call) if wanted else self.call(there)
        return out.to(x.device, x.dtype)

    def call(self, x: Tensor) -> Tensor:
        """`forward` on the words' device, without a gradient."""
        return torch_ops.linear(x, self.number) if torch_ops.is_watched(x) else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`call`, past torch's dispatcher."""
        rows = x.reshape(-1, self.in_features)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        workspace = self.workspace.take(linear.workspace_size(self.words, len(rows), x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear.linear(rows, self.words, bias, workspace=workspace).view(*x.shape[:-1], self.out_features)


class KLinearMarlin(KLinearPacked):
    """Any weight packed on a GPU: one that has no packed form of its own is quantized."""

    quantizing = (NUM_BITS, GROUP_SIZE)


class KLinearFP8(KLinearPacked):
    """`KLinearPacked`, under the name of rule files for FP8: such weights keep their 8 bits, activations theirs."""


class WithGradient(torch.autograd.Function):
    """(x, words, what multiplies x by them) -> its result; the gradient is of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of: words.Words, call: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.words = of
        return call(x)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, None, None]:
        return linear.gradient(of_out, ctx.words), None, None
