"""The KV cache of one conversation, and which tokens it holds, so that a next turn prefills only what is new.

The tensors are transformers' own, in the cache that the model makes itself, as some families have one of their own;
this file only keeps it in step with a list of token ids.
"""

from collections.abc import Sequence

from transformers import Cache, DynamicCache


class PrefixCache:
    """A model's cache together with the ids of the tokens in it; `cache` is None until a forward pass returns one.

    `ids` is extended only after a forward pass has finished, so an interrupted pass (Ctrl-C between two layers) leaves
    at worst surplus entries in some layers, which the next `reuse` cuts off.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache: Cache | None = None
        self.ids: list[int] = []

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep the longest prefix shared with `ids` and return its length in tokens.

        At least one token of `ids` is left to compute, since its logits are what decoding starts from.
        """
        length = 0
        for ours, theirs in zip(self.ids, ids[:-1], strict=False):
            if ours != theirs:
                break
            length += 1
        if self._crop(length):
            self.ids = list(ids[:length])
            return length
        self.clear()
        return 0

    def _crop(self, length: int) -> bool:
        """Cut every layer to `length` tokens. False when a layer cannot forget single tokens (linear attention)."""
        if length == 0 or type(self.cache) is not DynamicCache:  # a family's own cache may hold more than its layers
            return False
        for layer in self.cache.layers:
            if not layer.is_initialized or not hasattr(layer, "crop"):
                return False
            surplus = layer.get_seq_length() - length
            if surplus < 0:
                return False
            if surplus:
                layer.crop(-surplus)
        return all(layer.get_seq_length() == length for layer in self.cache.layers)
