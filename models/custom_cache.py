"""Upstream's path of caches. Here they are transformers' own, whatever an operator is given as `past_key_values`."""

from transformers import StaticCache

from ktransformers.upstream import gone, older_path

__all__ = ["StaticCache"]
_CACHE = "caches are transformers' own; write to the one given with past_key_values.update(keys, values, layer_idx)"
__getattr__ = gone(__name__, dict.fromkeys(("KVC2StaticCache", "KDeepSeekV3Cache", "KGQACache"), _CACHE))
older_path(__name__, "transformers.StaticCache")
