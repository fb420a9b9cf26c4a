"""Routed experts on packed weights on a GPU, computed by the kernels of kernels/experts.py: any routing by one graph.

Whole layers, or those of a layer that are worth a place on the GPU (hot_experts.py). Weights are kept and quantized as
linear_packed.py says. With adapters, and for gradients, one expert after the other is computed, by the kernels of
linear layers.
Letters: T tokens, H hidden, E experts, n of them here, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import experts as kernels
from ktransformers.kernels import linear, words
from ktransformers.kernels.compiler import too_old
from ktransformers.kernels.floats import Loss
from ktransformers.loaders import WeightSource
from ktransformers.loaders.sources import Matrices
from ktransformers.machine.streams import streams_of
from ktransformers.native import Glu, torch_ops
from ktransformers.operators.adapters import Adapters
from ktransformers.operators.gating import Gating, gating_of, uncomputed
from ktransformers.operators.inner_base import KExpertsBase, sum_by_expert
from ktransformers.operators.linear_packed import WithGradient
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


class KExpertsPacked(KExpertsBase):
    """Experts of one layer whose weights have packed forms of their own, on a GPU, of which nothing is asked."""

    on_gpu = takes_adapters = True
    quantizing: tuple[int, int] | None = None
    gating: Gating | None = None
    experts: kernels.Experts | None = None
    lost: float | None = None
    slots: Tensor | None = None  # int64 [E + 1]: where in `experts` each one is, n for one that is not; None: in order

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.name, self.number = self.key, torch_ops.name_it(self)

    @classmethod
    def keeps(cls, key: str, experts: nn.Module, weights: WeightSource | None) -> bool:
        """Whether the checkpoint's experts have a packed form of their own, and kernels compute them."""
        if weights is None or not weights.has_experts(key) or weights.experts_problem(key):
            return False
        names = [name for name in weights.names() if name.rpartition(".")[0] == key and name.endswith("_proj")]
        layouts = [layout_of_infos(weights.infos(name)) for name in names]
        return all(layout is not None and not layout.order for layout in layouts) and not uncomputed(
            experts, gating_of(experts)
        )

    @property
    def hidden(self) -> int:
        return self.experts.down.shape[1]

    def load(self, w: Any = None, device: Any = None) -> None:
        if self.ids is not None and not self.ids:
            return
        device = torch.device(self.device if device is None else device)
        gating = gating_of(self.orig_module)
        if problem := too_old(device) or self._uncomputed(gating):
            raise UnsupportedError(problem)
        stored, loss = self.gguf_loader.experts(self.key), Loss()
        self.slots = None if self.ids is None else self._slots(len(stored.up), device)
        gate, up, down = (self._packed(part, loss) for part in (stored.gate, stored.up, stored.down))
        biases = (self._bias(bias, device) for bias in (stored.gate_bias, stored.up_bias, stored.down_bias))
        glu = Glu(gating.activation, gating.alpha, gating.limit, *biases)
        first = (words.from_experts(up, device),) if gate is None else kernels.joined(gate, up, device)
        self.gating = gating
        self.experts = kernels.Experts(first, words.from_experts(down, device), glu, gate is not None)
        self.lost = report(self, loss)
        self.workspace = Workspace.of(self.gguf_loader, self.experts.down.device)

    def _uncomputed(self, gating: Any) -> str:
        if problem := uncomputed(self.orig_module, gating):
            return f"The kernels do not compute {problem}."
        problem = self.gguf_loader.experts_problem(self.key)
        return problem and f"{problem}."

    def _slots(self, count: int, device: torch.device) -> Tensor:
        slots = torch.full((count + 1,), len(self.ids), dtype=torch.int64, device="cpu")
        slots[list(self.ids)] = torch.arange(len(self.ids), device="cpu")
        return slots.to(device)

    def _packed(self, matrices: Matrices | None, loss: Loss) -> list[Any] | None:
        if matrices is None:
            return None
        chosen = matrices if self.ids is None else [matrices[e] for e in self.ids]
        return [as_packed(one, self.orig_module.down_proj.dtype, self.quantizing, loss) for one in chosen]

    def _bias(self, bias: Tensor | None, device: torch.device) -> Tensor | None:
        if bias is None:
            return None
        return (bias if self.ids is None else bias[list(self.ids)]).to(device)

    def unload(self) -> None:
        self.experts = self.slots = self.lost = None

    @property
    def form(self) -> str:
        """For a line about it: the packed form of most of its weights."""
        return "" if self.experts is None else form_of(self.experts.first[0], self.lost)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, adapters: Adapters | None = None) -> Tensor:
        device = self.experts.down.device
        x, ids, weights = hidden.to(device, computable(hidden.dtype)), ids.to(device), weights.to(device)
        if adapters is not None:
            out = self._one_by_one(x, ids, weights, adapters)
        elif torch_ops.is_watched(x) or torch_ops.wants_gradient(x, weights):
            out = torch_ops.experts(x, ids, weights, self.number)
        else:
            out = self.compute(x, ids, weights)
        return out.to(hidden.device, hidden.dtype)

    def backward(self, hidden: Tensor, ids: Tensor, weights: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of hidden [T, H] and of weights [T, K], from that of `compute`'s result; that is made again."""
        x, scale = hidden.detach().requires_grad_(), weights.detach().float().requires_grad_()
        with torch.enable_grad():
            out = self._one_by_one(x, ids, scale, Adapters())
        d_hidden, d_weights = torch.autograd.grad(out, (x, scale), d_out, allow_unused=True, materialize_grads=True)
        return d_hidden, d_weights

    def _one_by_one(self, x: Tensor, ids: Tensor, weights: Tensor, adapters: Adapters) -> Tensor:
        streams = streams_of(x.device)
        if streams is not None and streams.is_capturing():
            raise UnsupportedError(f"{self.key}: experts with an adapter are no part of a graph. Set KT_GRAPHS=0.")
        experts, glu = self.experts, self.experts.glu

        def times(rows: Tensor, stack: words.Words, slot: int) -> Tensor:
            one = stack.expert(slot)
            return WithGradient.apply(rows, one, lambda r: linear.linear(r, one))

        def compute(slot: int, rows: Tensor) -> Tensor:
            first = torch.cat([times(rows, stack, slot) for stack in experts.first], 1)
            biases = [bias[slot] for bias in (glu.gate_bias, glu.up_bias) if bias is not None]
            first = first + torch.cat(biases).to(first) if biases else first
            if adapters.first is not None:
                first = first + adapters.first.of(self.expert_of(slot), rows)
            middle = self.gating.apply(*(first.chunk(2, 1) if experts.gated else (None, first)))
            out = times(middle.contiguous(), experts.down, slot)
            out = out if glu.down_bias is None else out + glu.down_bias[slot].to(out)
            return out if adapters.down is None else out + adapters.down.of(self.expert_of(slot), middle)

        return sum_by_expert(x, ids.long(), weights, self.slots, experts.down.shape[0], compute)

    def compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`forward` on the weights' device, past torch's dispatcher."""
        if self.slots is not None:
            count = len(self.slots) - 1
            ids = self.slots[ids.where((ids >= 0) & (ids < count), count)]
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        workspace = self.workspace.take(kernels.workspace_size(self.experts, *ids.shape, hidden.dtype))
        return kernels.forward(self.experts, hidden, ids.contiguous(), weights.contiguous(), workspace=workspace)


class KExpertsMarlin(KExpertsPacked):
    """Any experts packed on a GPU: weights that have no packed form of their own are quantized."""

    quantizing = (NUM_BITS, GROUP_SIZE)
