"""Keys and values at fixed addresses, for steps that are captured as a graph; of layers that attend to all tokens.

transformers' static cache, which keeps its length in the device's memory, and two things that it cannot: it grows, and
it forgets the last tokens.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

LEAST_TOKENS = 1024
"""Of a new cache. Attention reads whatever there is room for, so room doubles, it does not begin large."""


class Captured:
    """A part of caches over whose memory steps are captured.

    `graph`: what engine/graphs.py captured over it, None when it moves; `graphable`: whether anything can be;
    `stepped`: whether a step of one token was computed over it.
    """

    graph: Any = None
    graphable = True
    stepped = False

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens in all."""
        raise NotImplementedError

    def unmoved(self) -> contextlib.AbstractContextManager[None]:
        """Inside, steps are captured, not computed."""
        return contextlib.nullcontext()

    def replays(self, held: int) -> None:
        """The graph is about to be replayed over `held` tokens."""


class FixedLayer(StaticLayer):
    """Keys [B, C, room, D] and values [B, C, room, V]."""

    @torch.inference_mode()
    def crop(self, tokens_to_remove: Any) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}, expected minus the number of tokens to remove.")
        if self.is_initialized:
            self.cumulative_length.add_(int(tokens_to_remove)).clamp_(min=0)

    @torch.inference_mode()
    def grow(self, tokens: int) -> None:
        """Have room for `tokens`, elsewhere in memory."""
        self.max_cache_len = tokens
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], tokens, old.shape[3])
            new[:, :, : old.shape[2]].copy_(old)
            setattr(self, name, new)


class FixedCache(Captured, StaticCache):
    """One sequence's."""

    def __init__(self, config: Any, tokens: int = LEAST_TOKENS) -> None:
        super().__init__(config=config, max_cache_len=tokens)
        self.layers = [FixedLayer(tokens) for _ in self.layers]
        self.room = tokens

    def reserve(self, tokens: int) -> None:
        if tokens <= self.room:
            return
        while self.room < tokens:
            self.room *= 2
        self.graph = None
        for layer in self.layers:
            layer.grow(self.room)


def fixed_cache(model: nn.Module) -> FixedCache | None:
    """A fresh cache for `model`; None where a layer keeps something else than the keys and values of all tokens."""
    family = type(getattr(model, "orig_module", None) or model)
    if not GenerationMixin._supports_default_dynamic_cache.__func__(family):
        return None
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    return FixedCache(config) if layers and all(type(layer) is DynamicLayer for layer in layers) else None
