"""A step of one sequence: token ids in, logits of the next token out. Prints nothing, chooses nothing.

A prompt goes through the model's forward in chunks. A single token after it goes through the recorded step
(native.Decode) on the CPU, or the captured graph (graphs.py) on a GPU, where the model has one; else through the
forward too.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ktransformers import env
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.graphs import graph_of
from ktransformers.engine.outside import device_of
from ktransformers.machine.streams import streams_of
from ktransformers.models import ONE_BY_ONE
from ktransformers.native import Decode
from ktransformers.operators.fixed_cache import Captured, fixed_cache
from ktransformers.operators.gpu_pages import gpu_pages
from ktransformers.operators.host_experts import finish
from ktransformers.operators.paged_cache import PagedCache, paged_cache
from ktransformers.operators.stack import decode_of


class Steps:
    """The steps of one sequence, whose keys and values are in `cache`. For one thread."""

    def __init__(self, model: nn.Module, cache: PrefixCache) -> None:
        self.model, self.cache = model, cache
        self._device, self._entry = device_of(model), model.device  # found by walks over modules
        self._streams = streams_of(self._device) if env.graphs() else None
        self._recorded: Decode | None = None
        self._looked_up = False

    def prompt(self, ids: Sequence[int], chunk_size: int) -> Tensor | None:
        """Compute what the cache lacks of `ids`, `chunk_size` tokens at a time; the logits [V] after the last.

        None where the cache lacks nothing.
        """
        logits = None
        while len(self.cache.ids) < len(ids):
            logits = self.chunk(ids, chunk_size)[-1]
        return logits

    @torch.inference_mode()
    def chunk(self, ids: Sequence[int], chunk_size: int, every: bool = False) -> Tensor:
        """Compute at most `chunk_size` of the tokens of `ids` that the cache lacks; the logits [1, V] after the last,
        or with `every` [T, V] after each."""
        begin = len(self.cache.ids)
        later = 1 if getattr(self.model.config, "model_type", None) in ONE_BY_ONE else chunk_size
        self._looked_up = False  # the cache may be another one, and may change until the next token
        return self._forward(ids[begin : begin + (later if begin else chunk_size)], every)

    def share(self, other: "Steps") -> bool:
        """Let `other` begin where this one is, on pages that they share until one writes; whether that can be done."""
        if type(self.cache.cache) is not PagedCache:
            return False
        other.cache.cache, other.cache.ids = copy.deepcopy(self.cache.cache), list(self.cache.ids)
        return True

    @torch.inference_mode()
    def next(self, token: int) -> Tensor:
        """Compute one token more; the logits [V] after it, in memory that the next call may write to again."""
        if not self._looked_up:
            self._recorded, self._looked_up = decode_of(self.model, self.cache.cache), True
        if self._recorded is None:
            return self._by_graph(token)
        with self.cache.extending([token]):
            return self._recorded(token)

    def _by_graph(self, token: int) -> Tensor:
        """By the graph over the cache. A first token makes what a graph cannot: it goes by the forward."""
        cache, streams = self.cache, self._streams
        if streams is None or not isinstance(cache.cache, Captured) or not cache.cache.graphable:
            return self._forward([token])[-1]
        cache.cache.reserve(len(cache.ids) + 1)
        first, cache.cache.stepped = not cache.cache.stepped, True
        step = None if first else graph_of(self.model, cache.cache, streams, self._device)
        if step is None:
            return self._forward([token])[-1]
        with cache.extending([token]):
            cache.cache.replays(len(cache.ids))
            return step(token, len(cache.ids))

    def _forward(self, ids: Sequence[int], every: bool = False) -> Tensor:
        """One forward pass over `ids` [T] that extends the cache; the logits [1, V] of the last position, or [T, V]."""
        cache = self.cache
        if cache.cache is None:  # a rule file may leave the model, which would make one, to transformers
            others = fixed_cache if self._streams else paged_cache
            cache.cache = gpu_pages(self.model, plain=True) or others(self.model)  # one sequence: nothing is padded
        if isinstance(cache.cache, Captured):
            cache.cache.reserve(len(cache.ids) + len(ids))
        input_ids = torch.tensor([list(ids)], device=self._entry)
        with cache.extending(ids):
            keep = 0 if every else 1  # 0 keeps all
            output = self.model(input_ids=input_ids, past_key_values=cache.cache, use_cache=True, logits_to_keep=keep)
            cache.cache = output.past_key_values
            finish(self._device)
        return output.logits[0] if every else output.logits[0, -1:]
