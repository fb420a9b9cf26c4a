"""What inner operators have in common: how a linear layer's weight is read, and what experts are asked.

Letters: N output features, K input features; T tokens, H hidden, K experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransformers.errors import WeightError
from ktransformers.loaders import WeightSource

Weight = dict | nn.Parameter | tuple | None
"""What `load(w=...)` takes: nothing (read the checkpoint), the weight [N, K], or (weight, bias)."""


class KLinearBase:
    """Reads the weight of a linear layer from the checkpoint, whatever its format. Two ways to use it:

    - as a mixin beside `BaseInjectedModule`, with ``KLinearBase.__init__(self)`` after the other constructor;
    - as the base of an inner operator, constructed with all arguments.

    Gives `in_features`, `out_features` and `load_weight()`; subclasses write `load`, `unload` and `forward`.
    """

    adopts: ClassVar[bool] = False
    """A linear operator keeps the weight in a form of its own, so the original's (meta) parameters go."""

    def __init__(
        self,
        key: str | None = None,
        gguf_loader: WeightSource | None = None,
        config: Any = None,
        orig_module: nn.Module | None = None,
        device: str | None = None,
        **kwargs: Any,
    ):
        if key is not None:
            super().__init__()
            self.key, self.gguf_loader, self.config = key, gguf_loader, config
            self.device = "cuda" if device is None else device
            object.__setattr__(self, "orig_module", orig_module)  # past nn.Module, which would register it
        self.has_bias = getattr(self.orig_module, "bias", None) is not None
        if self.orig_module is not None:
            self.in_features, self.out_features = self.orig_module.in_features, self.orig_module.out_features
        else:
            self.out_features, self.in_features = self.gguf_loader.shape(f"{self.key}.weight")

    def load_weight(
        self, override_key: str | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> nn.Parameter | tuple[nn.Parameter, nn.Parameter]:
        """Read the weight [N, K], or (weight, bias [N]) if the layer has a bias. Neither requires gradients.

        `dtype` None is torch's default dtype; quantized weights are dequantized into it. `device` None is the
        operator's. Raises WeightError when the shape does not fit the layer.
        """
        key = override_key or self.key
        device = self.device if device is None else device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        weight = self.gguf_loader.tensor(f"{key}.weight", device=device, dtype=dtype)
        self.check_shape(weight.shape, key)
        weight = nn.Parameter(weight, requires_grad=False)
        if getattr(self.orig_module, "bias", None) is None:
            return weight
        bias = self.gguf_loader.tensor(f"{key}.bias", device=device, dtype=dtype)
        return weight, nn.Parameter(bias, requires_grad=False)

    def check_shape(self, found: Sequence[int], key: str) -> None:
        """Raise WeightError where the checkpoint's weight of `key` does not fit the layer."""
        if tuple(found) != (expected := (self.out_features, self.in_features)):
            raise WeightError(
                f"{key}.weight: the checkpoint holds {list(found)}, the layer expects {list(expected)}."
            )


def weight_and_bias(w: Weight, key: str) -> tuple[Tensor, Tensor | None]:
    """What a `Weight` that is not None holds."""
    weight, bias = w if isinstance(w, tuple) else (w, None)
    if not isinstance(weight, Tensor):
        raise WeightError(f"{key}: found {type(weight).__name__}, expected the weight or (weight, bias).")
    return weight, bias


def sum_by_expert(
    x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor | None, count: int, compute: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """[T, H]: the weighted sums of `compute(slot, rows [t, H])`, called once for each slot that has tokens.

    `count` slots; `slots` [E + 1] says which one an expert is in, `count` for none; None: in order. All on one device.
    """
    n_experts = count if slots is None else len(slots) - 1
    flat = ids.reshape(-1)  # pair p is slot p % K of token p // K
    flat = flat.where((flat >= 0) & (flat < n_experts), n_experts)  # what is to be skipped sorts last
    flat = flat if slots is None else slots[flat]
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=count + 1)[:count].tolist()
    scale = weights.reshape(-1, 1)
    out = torch.zeros_like(x)
    start = 0
    for slot, tokens_there in enumerate(counts):
        if tokens_there == 0:
            continue
        pairs = order[start : start + tokens_there]
        start += tokens_there
        tokens = pairs // ids.shape[1]
        y = compute(slot, x[tokens]) * scale[pairs]
        out.index_add_(0, tokens, y.to(out.dtype))
    return out


class KExpertsBase:
    """An inner operator for the experts under `key`: `load` reads them, `unload` gives the memory back."""

    ids: Sequence[int] | None = None
    """The experts to hold, ascending; None is all. Those of others come as -1, or are skipped, and take no memory."""

    def __init__(self, key: str, gguf_loader: WeightSource, config: Any, orig_module: nn.Module, device: Any = "cpu"):
        self.key, self.gguf_loader, self.config = key, gguf_loader, config
        self.orig_module, self.device = orig_module, device

    def expert_of(self, slot: int) -> int:
        """The expert that is the one of this number here."""
        return slot if self.ids is None else self.ids[slot]

    def load(self, w: Any = None, device: Any = None) -> None:
        raise NotImplementedError

    def unload(self) -> None:
        raise NotImplementedError

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], ids int64 [T, K], weights float [T, K] -> [T, H], dtype and device as `hidden`."""
        raise NotImplementedError
