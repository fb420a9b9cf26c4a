"""Attention that computes on pages of the cache: what all such operators share.

What a module computes is recognized by its results: grouped queries (attending.py) or latents (attending_latents.py).

One native call does projections, norms, positions, cache and attention of a step. Where something else is asked for, a
GPU, a cache of transformers, attentions, gradients, an adapter on a projection, the operator's other code computes:
`update` of a paged layer serves that too. Letters: B batch, S queries, T cached tokens, H hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers.native import Attention, torch_ops
from ktransformers.operators.attention_inputs import CHANGE_NOTHING, CHOSEN, only_hides
from ktransformers.operators.base_operator import warn_once
from ktransformers.operators.gpu_attention import GpuAttention, gpu_attention
from ktransformers.operators.native_operator import NativeOperator
from ktransformers.operators.paged_cache import PagedCache, PagedIndexedLayer, PagedLayer
from ktransformers.operators.watching import Numbers


class Recognized(Protocol):
    """What a module computes, in numbers."""

    rotates: bool
    """Whether positions are turned into keys and queries at all."""
    joined: bool
    """Whether a token's key and value lie in one row of the cache."""
    narrow: str | None
    """What chooses the keys that a query sees, and needs more than positions and a mask for it."""
    tells: bool
    """Whether forward gives back what was chosen, too."""
    takes: frozenset[str | None]
    """Arguments of forward besides those that all take."""
    plain: bool
    """Whether it takes and gives no more than positions, a mask and a cache."""
    step_of: tuple[Any, ...]
    """What of a step is the module's own: modules alike in this may share one."""
    kept: tuple[int, int, int]
    """What the cache keeps of a token: heads, and the sizes of their keys and values."""

    def native(self, operator: nn.Module) -> Attention | None:
        """The native call on the operator's loaded weights; None where they are not all on the CPU."""

    def chosen(self, operator: nn.Module, held: PagedLayer, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Numbers of the keys that the queries of `hidden` see, [B, S, K], where `narrow` says so."""

    def query_factor(self, held: PagedLayer, tokens: int, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What the queries of `tokens` more tokens are multiplied by, [B or 1, S]; None for nothing."""


_KNOWN = CHANGE_NOTHING | {"attention_mask", "position_embeddings", "past_key_values"}


class PagedAttention(NativeOperator):
    """hidden [B, S, H] -> ([B, S, H], None) natively where it can; a subclass says what computes otherwise."""

    kinds: ClassVar[tuple[Callable[[nn.Module], Recognized | None], ...]] = ()
    """What recognizes the modules that a subclass computes natively; the first that does not say None counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attending: Recognized | None = None
        self.gpu: GpuAttention | None = None
        self.not_gpu = ""  # why there is none
        self.cache_kind: str | None = None  # of pages that `paged_cache` makes for this layer; None: the model's dtype

    def load(self) -> None:
        super().load()
        if not is_in_torch_dispatch_mode():  # a simulation: there are no weights to compute with
            self._look_for_kernels()

    def _look_for_kernels(self) -> None:
        """Have what computes few tokens on a GPU, by the module's numbers as they are."""
        self._numbers = Numbers([self, *self._modules.values()])
        found = gpu_attention(self)
        self.gpu, self.not_gpu = (None, found) if isinstance(found, str) else (found, "")
        if self.gpu is not None:
            self.native = None  # tests let kernels run on a CPU
        elif torch.device(self.devices.get(self.key, self.generate_device)).type == "cuda":
            kind = type(self.orig_module).__name__
            warn_once(f"attention on a GPU goes by torch alone, for {found} ({kind}; {self.key})", about=kind + found)

    def is_known(self) -> bool:
        """Whether kernels compute few tokens; whose numbers have changed is looked at anew."""
        if self.gpu is not None and not self._numbers.unchanged():
            self._look_for_kernels()
        return self.gpu is not None

    def unload(self) -> None:
        super().unload()
        self.gpu = None

    def recognize(self) -> None:
        found = (recognize(self.orig_module) for recognize in self.kinds)
        self.attending = next((kind for kind in found if kind is not None), None)

    def make_native(self) -> Attention | None:
        self.recognize()
        if self.attending is None or any(t.device.type != "cpu" for _, t in self.named_parameters()):
            return None
        return self.attending.native(self)

    def otherwise(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What computes where the native call cannot."""
        return super().forward(hidden, *args, **kwargs)

    @property
    def computes_on_pages(self) -> bool:
        return self.native is not None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_known() and not args:
            out = self.gpu.forward(self, hidden_states, kwargs)
            if out is not None:
                return out, None
        held = None if args else self.pages(hidden_states, kwargs)
        if held is None:
            return self.otherwise(hidden_states, *args, **kwargs)
        chosen = self.attending.chosen(self, held, hidden_states, kwargs)
        positions, mask, *rest = self.step(held, hidden_states, kwargs)
        mask = mask if chosen is None else _narrowed(mask, chosen)
        out = self.native.forward(hidden_states, held.pages, positions, mask, *rest)
        held.advanced()
        return (out, None, chosen) if self.attending.tells else (out, None)

    def pages(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> PagedLayer | None:
        """This layer's part of the cache, ready for a native call with these arguments of `forward`; a passing one
        where no cache is kept; None where the other code has to compute."""
        if self.native is None or torch_ops.is_traced(hidden):  # a tracer cannot follow what pages there are
            return None
        self.renew(hidden.shape[1])
        if self.native is None or not self._is_plain(hidden, kwargs):
            return None
        cache = kwargs.get("past_key_values")
        joined, narrow = self.attending.joined, self.attending.narrow
        if narrow and kwargs.get("attention_mask") is None or narrow == "chosen" and kwargs.get(CHOSEN) is None:
            return None
        if cache is None:
            held = PagedLayer(joined=joined)
        else:
            held = cache.layers[self.layer_idx] if type(cache) is PagedCache else None
        if not isinstance(held, PagedLayer) or held.joined != joined:
            return None
        if narrow == "index" and cache is not None and not isinstance(held, PagedIndexedLayer):
            return None
        held.prepare(*self.attending.kept, hidden.dtype)
        return held

    def step(
        self, held: PagedLayer, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, int, Tensor | None]:
        """Positions, mask and its first token, and factors of queries, as `native.Attention.forward` takes them."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype != torch.bool:
            mask = mask == 0
        positions = kwargs.get("position_embeddings") if self.attending.rotates else None
        if isinstance(positions, Tensor):  # complex factors
            positions = positions.real, positions.imag
        factor = self.attending.query_factor(held, hidden.shape[1], kwargs)
        return positions, mask, held.first_visible() if mask is not None else 0, factor

    def _is_plain(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether nothing is asked for that only the other code does."""
        if torch_ops.is_traced(hidden) or hidden.device.type != "cpu" or not self.asks_for_no_more(hidden, kwargs):
            return False
        mask = kwargs.get("attention_mask")
        return mask is None or only_hides(mask, hidden.shape[1]) and _looks_back(mask)

    def asks_for_no_more(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether what is asked for are numbers alone, of the module as it was loaded, by arguments that are known."""
        if torch.is_grad_enabled() and self.wants_gradients(hidden) or not self.is_as_loaded():
            return False
        if self.training and getattr(self.orig_module, "attention_dropout", 0.0):
            return False
        if kwargs.get("output_attentions", getattr(self.orig_module.config, "output_attentions", False)):
            return False
        return all(name in _KNOWN or value is None or name in self.attending.takes for name, value in kwargs.items())


def _narrowed(mask: Tensor, chosen: Tensor) -> Tensor:
    """A bool mask [B or 1, 1, S, T] without the keys whose numbers are not in `chosen` [B, S, K]."""
    batch, queries, count = chosen.shape
    keys = mask.shape[-1]
    if count >= keys:  # all
        return mask
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool, device="cpu").scatter_(-1, chosen.long(), True)
    return mask & seen.unsqueeze(1)


def _looks_back(mask: Tensor) -> bool:
    """Whether no query of a mask [B or 1, 1, S, T] sees a key after it. Of few queries C sees to that itself: all their
    keys are in the cache before any of them is computed."""
    queries = mask.shape[2]
    if queries <= _FEW:
        return True
    ahead = mask[..., -queries:]
    ahead = ahead if ahead.dtype == torch.bool else ahead == 0
    return not bool(ahead.triu(1).any())


_FEW = 256
"""Queries of a sequence that C never parts."""
