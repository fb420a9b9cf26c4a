"""The KV cache of one conversation, and which tokens it holds, so that a next turn prefills only what is new.

The tensors are transformers' own, in the cache that the model makes itself, as some families have one of their own;
this file only keeps it in step with a list of token ids. Going back to a shorter prefix is all or nothing: where one
layer cannot (a recurrent state, a window that has moved on), the whole prefix is computed again.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ktransformers.operators.fixed_cache import FixedCache
from ktransformers.operators.gpu_pages import GpuLayer, GpuPages
from ktransformers.operators.paged_cache import PagedCache, PagedLayer, PagedWindowLayer


class PrefixCache:
    """A model's cache together with the ids of the tokens in it; `cache` is None until a forward pass returns one.

    `ids` is extended only after a forward pass has finished. One that was interrupted (Ctrl-C between two layers)
    leaves surplus entries in some layers: the cache is then torn, and `reuse` keeps only what it can prove.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache: Cache | None = None
        self.ids: list[int] = []
        self._torn = False
        self._forgotten: dict[int, int] = {}  # layer -> tokens that its window had dropped when it began to record

    @contextlib.contextmanager
    def extending(self, ids: Sequence[int]) -> Iterator[None]:
        """Around a forward pass over `ids`, which sets `cache`."""
        self._torn = True
        yield
        self.ids.extend(ids)
        self._torn = False

    def record(self) -> None:
        """From here on sliding windows keep what they would drop, so that the tokens that follow can be taken back.

        Called after prefill: an answer is often rendered otherwise in the next prompt (without its reasoning), and
        a window that has moved over it could not go back. Costs the memory of the answer's keys and values.
        """
        for number, layer in enumerate(_layers(self.cache)):
            if isinstance(layer, PagedWindowLayer):
                layer.activate_past_recording()
            elif type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
                layer.activate_past_recording()
                self._forgotten[number] = layer.get_seq_length() - layer.keys.shape[-2]

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep the longest prefix shared with `ids` and return its length in tokens.

        At least one token of `ids` is left to compute, since its logits are what decoding starts from.
        """
        length = 0
        for ours, theirs in zip(self.ids, ids[:-1], strict=False):
            if ours != theirs:
                break
            length += 1
        if length == 0 or not self._shorten(length):
            if self.ids or self._torn:  # an empty cache that somebody chose is as good as a fresh one
                self.clear()
            return 0
        self.ids = list(ids[:length])
        return length

    def _shorten(self, length: int) -> bool:
        """Cut every layer to `length` tokens; False, and nothing is cut, when one of them cannot."""
        layers = [layer for layer in _layers(self.cache) if not isinstance(layer, DummyLayer)]
        if length == len(self.ids) and not self._torn:
            layers = [layer for layer in layers if getattr(layer, "record_past", False)]  # back to the window's size
        elif type(self.cache) not in (DynamicCache, PagedCache, FixedCache, GpuPages) or not layers:
            return False  # a family's own cache may hold more than its layers
        elif not all(_can_forget(layer, length) for layer in layers) or self._torn and not self._whole():
            return False
        self._torn = True
        for layer in layers:
            layer.crop(length - layer.get_seq_length())
            layer.record_past = False
        self._torn = False
        self._forgotten.clear()
        return True

    def _whole(self) -> bool:
        """Whether each layer of a torn cache was left between two updates, so that its length is what it says."""
        for number, layer in enumerate(_layers(self.cache)):
            if isinstance(layer, (PagedLayer, GpuLayer)):
                continue  # its length is counted when all is written
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
                return False  # holds more than keys and values
            if type(layer) is not DummyLayer and layer.is_initialized:
                kept = layer.get_seq_length() - self._forgotten.get(number, 0)
                if not layer.keys.shape[-2] == layer.values.shape[-2] == kept:
                    return False
        return True


def _layers(cache: Cache | None) -> list[Any]:
    return list(getattr(cache, "layers", None) or ())


def _can_forget(layer: Any, length: int) -> bool:
    """Whether `layer.crop` leaves it as if only `length` tokens had been seen.

    `is_croppable` does not say so: sliding windows and layers that inherit it have it too.
    """
    if isinstance(layer, (PagedLayer, GpuLayer)):
        return layer.can_forget(length)
    if isinstance(layer, LinearAttentionCacheLayerMixin) or not _crops_all_of_itself(type(layer)):
        return False
    seen, window = layer.get_seq_length(), getattr(layer, "sliding_window", None)
    if not layer.is_initialized or seen < length:
        return False
    if window is None or seen < window:
        return True
    return layer.record_past and layer.keys.shape[-2] - (seen - length) >= min(window - 1, length)


def _crops_all_of_itself(kind: type) -> bool:
    """Whether `crop` is as specific as what fills the layer; an inherited one knows nothing of a subclass's state."""

    def depth(name: str) -> int:
        return next((i for i, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))

    return depth("crop") <= min(depth("update"), depth("reset"), depth("__init__"))
