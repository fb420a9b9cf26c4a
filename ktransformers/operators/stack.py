"""All layers of a decoder in one native call.

The family's code walks over its layers and calls each. Where the layers from one on are native (layer.py), all see the
whole context, and nobody looks between them, the first of them computes them all, and the others pass on what they are
given. What was compared and looked up to know so is watched: a step only asks whether any of it has changed.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.native import torch_ops
from ktransformers.operators.base_operator import version
from ktransformers.operators.combining import has_hooks, is_collecting
from ktransformers.operators.paged_cache import PagedCache, PagedLayer
from ktransformers.operators.routing import may_use_c

if TYPE_CHECKING:
    from ktransformers.operators.layer import KDecoderLayer


_PLAIN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
                    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits",
                    "return_dict", "logits_to_keep"})  # fmt: skip
"""Arguments of a decoder's forward that bring nothing in between its layers."""


class Watch:
    """Children, hooks and tensors of some modules as they are now."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        below = {id(m): m for module in modules for m in module.modules()}.values()
        self._children = [(m._modules, name, child) for m in below for name, child in m._modules.items()]
        tables = [t for m in below for t in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks = [(table, len(table)) for table in tables]
        self._modes = [(vars(m), m.training) for m in below]
        self._tensors = [(t, version(t), t.data_ptr()) for m in below for t in m._parameters.values() if t is not None]

    def unchanged(self) -> bool:
        return (
            all(table.get(name) is child for table, name, child in self._children)
            and all(len(table) == count for table, count in self._hooks)
            and all(values["training"] is mode for values, mode in self._modes)
            and all(version(t) == written and t.data_ptr() == place for t, written, place in self._tensors)
        )


class Stack:
    """The layers of one decoder; `layer.stack_layers` tells each its place in it."""

    def __init__(self, layers: Sequence["KDecoderLayer"], config: Any) -> None:
        self.layers, self.config = list(layers), config
        self._made: dict[torch.dtype, tuple[Watch, native.Layers]] = {}
        self._walk = threading.local()  # of each thread's forward: what was given to whom, see below
        self._straight = False

    def begin(self, kwargs: Mapping[str, Any]) -> None:
        """A forward of the decoder begins, with these arguments."""
        walk = self._walk
        walk.passed = walk.last = None
        walk.plain = all(value is None or name in _PLAIN for name, value in kwargs.items())

    def saw(self, index: int, hidden: Tensor, out: Any) -> None:
        """Layer `index` computed by itself. Once all did, each on what the one before gave and nothing else (vision
        features may be added in between), the stack may compute them."""
        walk = self._walk
        if self._straight or not getattr(walk, "plain", False):
            return
        walk.line = index == 0 or getattr(walk, "line", False) and walk.last is hidden
        walk.last = out
        if index == len(self.layers) - 1:
            self._straight, walk.last = walk.line, None

    def passes(self, index: int, hidden: Tensor) -> bool:
        """Whether layer `index` is given what the stack computed, itself included."""
        walk = self._walk
        if getattr(walk, "passed", None) is not hidden or index != walk.next:
            return False
        walk.next += 1
        if walk.next == len(self.layers):
            walk.passed = None
        return True

    def forward(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """All layers on `hidden` [B, S, H], for what the first was called with; None where they go one by one."""
        cache = kwargs.get("past_key_values")
        if not self._straight or not getattr(self._walk, "plain", False):
            return None
        if type(cache) is not PagedCache or torch.is_grad_enabled() or is_collecting():
            return None
        if getattr(self.config, "num_hidden_layers", 0) != len(self.layers) or len(cache.layers) < len(self.layers):
            return None
        held = cache.layers[: len(self.layers)]
        if any(type(layer) is not PagedLayer for layer in held):  # a window has a mask of its own
            return None
        made = self._made.get(hidden.dtype)
        if made is None or not made[0].unchanged():
            made = self._make(hidden, kwargs)
            if made is None:
                return None
            self._made[hidden.dtype] = made
        first = self.layers[0]  # what all are called with; that the rest is as it was, the watch has said
        if not may_use_c(first, hidden) or torch_ops.is_traced(hidden) or first.attention.pages(hidden, kwargs) is None:
            return None
        for layer, part in zip(self.layers, held, strict=True):
            if part.pages is None:
                part.prepare(*layer.attention.attending.kept, hidden.dtype)
        step = first.attention.step(held[0], kwargs)
        out = made[1].forward(hidden, [part.pages for part in held], *step)
        self._walk.passed, self._walk.next = (out if len(self.layers) > 1 else None), 1
        return out

    def forget(self) -> None:
        """A layer gave its weights back: each computes by itself until all are loaded again."""
        self._made.clear()
        self._straight = False

    def _make(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Watch, native.Layers] | None:
        if any(has_hooks(layer) for layer in self.layers):
            return None
        found = [layer.native_step(hidden, kwargs) for layer in self.layers]
        if any(one is None for one in found) or len({layer.attention.attending.rotates for layer in self.layers}) > 1:
            return None
        return Watch(self.layers), native.Layers([one[0].layers[0] for one in found])
