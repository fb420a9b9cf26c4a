"""A step of one token as a captured graph: on a GPU a whole model is one launch, with its experts on the CPU.

Captured once for a cache's memory, and again when that has moved. Python does not run when a graph is replayed: whoever
puts hooks on modules, or changes them, after the first token of a cache sets KT_GRAPHS=0.
"""

import torch
from torch import Tensor, nn

from ktransformers.engine.outside import Rows, head_elsewhere
from ktransformers.machine.streams import Streams
from ktransformers.models.traits import TRAITS
from ktransformers.operators.base_operator import warn_once
from ktransformers.operators.fixed_cache import Captured
from ktransformers.operators.host_experts import finish


class GraphStep:
    """token -> logits of the next, over the cache that it was captured with."""

    def __init__(self, model: nn.Module, cache: Captured, streams: Streams, device: torch.device) -> None:
        """After a step of one token that was not captured: what is made at a first step must be there."""
        self._device = device
        self._ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._rows = Rows(model, self._ids, streams)
        given = {"input_ids": self._ids, "position_ids": self._at, "past_key_values": cache, "use_cache": True}
        decoder, self._head = head_elsewhere(model, device) or (None, None)
        with self._rows.in_place(), streams.capture() as self._graph:
            if decoder is None:
                self._out = model(**given, logits_to_keep=1).logits[0, -1]
            else:
                self._out = decoder(**given).last_hidden_state[:, -1:]

    def __call__(self, token: int, position: int) -> Tensor:
        """The logits [V] after `token`, in memory that the next call may write to again."""
        self._rows.look_up(token)
        self._ids.fill_(token)
        self._at.fill_(position)
        self._graph.replay()
        finish(self._device)
        return self._out if self._head is None else self._head(self._out)[0, -1]


def graph_of(model: nn.Module, cache: Captured, streams: Streams, device: torch.device) -> GraphStep | None:
    """The graph over `cache` as it is now, captured where there is none; None where that is not possible."""
    if cache.graph is None and cache.graphable:
        cache.graphable = _may_be_captured(model, device)
        try:
            with cache.unmoved():
                cache.graph = GraphStep(model, cache, streams, device) if cache.graphable else None
        except Exception as error:  # whatever a family's code does that cannot be captured: it works without
            cache.graphable = False
            warn_once(f"decoding without a graph on {device}: {type(error).__name__} while it was captured: {error}")
    return cache.graph


def _may_be_captured(model: nn.Module, device: torch.device) -> bool:
    """Whether `model` is on one device, but for experts that C computes and what is computed outside of graphs, and
    nobody looks between its modules."""
    head = model.get_output_embeddings()
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(getattr(hook, "only_moves", False) for hook in hooks):
            return False
        tensors = (*module._parameters.values(), *module._buffers.values())
        here = all(tensor is None or tensor.device == device for tensor in tensors)
        if not here and module is not head and not TRAITS["embedding"](module):
            return False
    return True
