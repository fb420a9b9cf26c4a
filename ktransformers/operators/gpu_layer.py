"""A decoder layer's step of a few tokens on a GPU in few launches: norms with the sums before them, joined products,
activation(gate) * up. What is where in a layer is recognized as it is for C (layer.py); what is not known, the family
computes.

Launches of a layer of grouped queries and a dense MLP: norm, product, norms of heads with positions and cache,
attention (two where a long context is cut), product; sum with norm, product, activation, product with sum. Of latents
four more: the norm of queries' latents, their product, and those that absorb.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.operators import gpu_ops
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.combining import has_hooks, is_observed
from ktransformers.operators.experts_in_c import is_foreign, mlp_gating
from ktransformers.operators.gpu_attention import layer_of
from ktransformers.operators.joined import Joined, plain_weight
from ktransformers.operators.twin import original


class GpuMlp:
    """A dense MLP: x [.., H] -> [.., H]."""

    def __init__(self, mlp: nn.Module) -> None:
        """Raises ValueError for one that is not known."""
        self._gating = None if is_foreign(mlp) else mlp_gating(mlp)
        names = {name for name, child in mlp._modules.items() if child is not None}
        if self._gating is None:
            raise ValueError("not an MLP that kernels compute")
        inputs = [mlp._modules[name] for name in ("gate_up_proj", "gate_proj", "up_proj") if name in names]
        self._halves = "gate_up_proj" in names
        self._made, self._down = Joined(inputs), mlp._modules["down_proj"]
        self._children = dict(mlp._modules)

    def still_of(self, mlp: nn.Module) -> bool:
        """Whether it has the children that it had, and nobody looks at them."""
        same = all(mlp._modules.get(name) is child for name, child in self._children.items())
        return same and not any(has_hooks(child) for child in self._children.values() if child is not None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._activated(x))

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """total + the result, in the place of total where one product does both."""
        activated, weight = self._activated(x), plain_weight(self._down)
        if weight is None or weight.dtype != total.dtype:
            return total + self._down(activated)
        total.view(-1, total.shape[-1]).addmm_(activated.view(-1, activated.shape[-1]), weight.T)
        return total

    def _activated(self, x: Tensor) -> Tensor:
        *gate, up = self._made(x)[0].chunk(2, -1) if self._halves else self._made(x)
        how = self._gating.activation, self._gating.alpha, self._gating.limit
        return gpu_ops.glu(up, gate[0] if gate else None, *how)


class GpuSteps:
    """The steps of a `KDecoderLayer` whose attention is computed by kernels."""

    def __init__(self, layer: nn.Module) -> None:
        """Raises ValueError for a layer whose MLP asks for more than hidden states."""
        self._mlp = mlp = layer._modules[layer.stacking.second.part]
        try:
            self._dense = GpuMlp(mlp)
        except ValueError:
            self._dense = None
            own = inspect.signature(type(original(mlp)).forward).parameters.values()
            if len([one for one in own if one.kind is one.POSITIONAL_OR_KEYWORD]) != 2:  # itself, too
                raise

    def forward(self, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """hidden [B, T, H] -> [B, T, H], or None where the layer's other code has to compute."""
        s, mixer = layer.stacking, layer.mixer
        if torch.is_grad_enabled() or layer._modules[s.second.part] is not self._mlp or is_observed(layer, s.children):
            return None
        if not mixer.is_known() or layer_of(mixer, hidden, kwargs)[0] is None:
            return None
        gave = mixer.gpu.forward(mixer, self._normed(layer, s.first.before, hidden), kwargs)
        if gave is None:
            return None
        gave = self._normed(layer, s.first.after, gave)
        if s.parallel:
            total, given = _sum(s.first, hidden, gave), self._normed(layer, s.second.before, hidden)
        else:
            total, given = self._summed(layer, hidden, gave)
        mlp = self._second()
        if mlp is self._dense and s.second.after is None and (s.second.keep, s.second.factor) == (1.0, 1.0):
            return mlp.add_to(total, given)
        second = mlp(given)
        second = (second[0] if isinstance(second, tuple) else second).reshape(total.shape)  # some blocks give rows
        return _sum(s.second, total, self._normed(layer, s.second.after, second))

    def _second(self) -> Callable[[Tensor], Any]:
        fused = self._dense is not None and not has_hooks(self._mlp) and self._dense.still_of(self._mlp)
        return self._dense if fused else self._mlp

    def _normed(self, layer: nn.Module, name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return x
        how, norm = layer.stacking.norms[name], layer._modules[name]
        if how.centered or norm.weight.dtype != x.dtype:
            return norm(x)
        return gpu_ops.rms_norm(x, norm.weight.detach(), how.eps, how.plus_one)

    def _summed(self, layer: nn.Module, hidden: Tensor, gave: Tensor) -> tuple[Tensor, Tensor]:
        """The sum after attention, and what the MLP is given of it; in one launch where they are plain."""
        first, name = layer.stacking.first, layer.stacking.second.before
        how, weight = layer.stacking.norms.get(name), None if name is None else layer._modules[name].weight.detach()
        if how is None or how.centered or weight.dtype != gave.dtype or (first.keep, first.factor) != (1.0, 1.0):
            total = _sum(first, hidden, gave)
            return total, self._normed(layer, name, total)
        return gpu_ops.add_norm(gave, hidden, weight, how.eps, how.plus_one)


def _sum(half: Any, x: Tensor, gave: Tensor) -> Tensor:
    return torch.add(x if half.keep == 1.0 else x * half.keep, gave, alpha=half.factor)


def gpu_steps(layer: nn.Module) -> GpuSteps | None:
    """What steps a `KDecoderLayer` on a GPU; None where kernels do not compute its attention, or it is not known."""
    gpu = None if layer.stacking is None else getattr(layer.mixer, "gpu", None)
    if gpu is None or isinstance(layer.orig_module, BaseInjectedModule):
        return None
    try:
        return GpuSteps(layer)
    except ValueError:
        return None
