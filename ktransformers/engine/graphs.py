"""A step of one token as a captured graph: on a GPU a whole model is one launch, with its experts on the CPU.

Captured once for a cache's memory, and again when that has moved. Python does not run when a graph is replayed: whoever
puts hooks on modules, or changes them, after the first token of a cache sets KT_GRAPHS=0.
"""

import torch
from torch import Tensor, nn

from ktransformers.machine.streams import Streams
from ktransformers.operators.base_operator import warn_once
from ktransformers.operators.fixed_cache import FixedCache
from ktransformers.operators.host_experts import finish


class GraphStep:
    """token -> logits of the next, over the cache that it was captured with."""

    def __init__(self, model: nn.Module, cache: FixedCache, streams: Streams, device: torch.device) -> None:
        """After a step of one token that was not captured: what is made at a first step must be there."""
        self._device = device
        self._ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, 1, dtype=torch.int64, device=device)
        with streams.capture() as self._graph:
            given = {"input_ids": self._ids, "position_ids": self._at, "past_key_values": cache}
            self._logits = model(**given, use_cache=True, logits_to_keep=1).logits[0, -1]

    def __call__(self, token: int, position: int) -> Tensor:
        """The logits [V] after `token`, in memory that the next call writes to again."""
        self._ids.fill_(token)
        self._at.fill_(position)
        self._graph.replay()
        finish(self._device)
        return self._logits


def graph_of(model: nn.Module, cache: FixedCache, streams: Streams, device: torch.device) -> GraphStep | None:
    """The graph over `cache` as it is now, captured where there is none; None where that is not possible."""
    if cache.graph is None and cache.graphable:
        cache.graphable = _may_be_captured(model, device)
        try:
            cache.graph = GraphStep(model, cache, streams, device) if cache.graphable else None
        except Exception as error:  # whatever a family's code does that cannot be captured: it works without
            cache.graphable = False
            warn_once(f"decoding without a graph on {device}: {type(error).__name__} while it was captured: {error}")
    return cache.graph


def _may_be_captured(model: nn.Module, device: torch.device) -> bool:
    """Whether `model` is on one device, but for experts that C computes, and nobody looks between its modules."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    return all(tensor.device == device for tensor in (*model.parameters(), *model.buffers()))
