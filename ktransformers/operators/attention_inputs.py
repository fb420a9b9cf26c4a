"""What an attention operator that computes by itself can be given: caches, masks, kwargs and implementations.

A cache or an argument that it was not written for would mostly give wrong tokens, not an error. So it takes what is
listed here, each proved against transformers' own module by tests, and refuses anything else by name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.operators import cpu_attention

IMPLEMENTATIONS = (None, "sdpa", "eager", cpu_attention.NAME)
"""Values of `attn_implementation` whose masks are read: None, or 4-D tensors."""
BUILD_WITH = "Build the model with attn_implementation='sdpa' or 'eager'"

CACHE_LAYERS = {
    f"transformers.cache_utils.{name}"
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer",
                 "QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")
} | {f"ktransformers.operators.paged_cache.{name}" for name in ("PagedLayer", "PagedWindowLayer")} | {
    "ktransformers.operators.fixed_cache.FixedLayer", "ktransformers.operators.gpu_pages.GpuLayer"
}  # fmt: skip
"""Layers of a cache that are known, by full name. `update` of each takes and returns [B, heads, tokens,
size] and returns every token so far in order, or a buffer of fixed length with a mask for what it does not hold yet.
Whoever writes another such layer adds its name."""

CHOSEN = "prev_topk_indices"
"""The argument that says which keys the index of a layer before chose."""
CHANGE_NOTHING = frozenset({"use_cache", "output_attentions", "output_hidden_states", "cache_position", "position_ids",
                             "output_router_logits", "logits_to_keep", "return_dict"})  # fmt: skip
"""Arguments of an attention's forward that change no number where attentions are not asked for."""
PAGED = frozenset({"cache", "block_table", "read_index", "write_index"})
"""Arguments with which transformers' continuous batching keeps the cache to itself, past `past_key_values`."""
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
"""Arguments that say where sequences packed into one row end; only a mask says so here."""


def check_inputs(operator: str, config: Any, mask: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for arguments of an attention's forward that `operator` was not written for."""
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedError(
            f"{operator}: found attn_implementation {implementation!r}, expected 'sdpa', 'eager' or what "
            "optimize_and_load set. Set it back with model.set_attn_implementation."
        )
    for name, value in kwargs.items():
        if value is None:
            continue
        if name in PAGED:
            raise UnsupportedError(
                f"{operator}: found the argument {name!r} ({type(value).__name__}) of paged attention, expected a "
                "cache in past_key_values. Use model.generate: generate_batch works with transformers' attention alone."
            )
        if mask is None and (name in PACKED and not _is_one(name, value) or name == "is_causal" and value is False):
            raise UnsupportedError(
                f"{operator}: found the argument {name!r} and no mask, expected a 4-D mask for what is not plainly "
                f"causal. {BUILD_WITH}, and give an attention_mask."
            )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        found = f"a {mask.dim()}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"{operator} takes 4-D masks, found {found} (attn_implementation {implementation!r}). {BUILD_WITH}."
        )


def _is_one(name: str, value: Any) -> bool:
    """Whether an argument of PACKED says that a row holds one sequence: transformers then makes no mask."""
    if not isinstance(value, Tensor) or not value.numel():
        return False
    return bool((value == value[..., :1]).all()) if name == "seq_idx" else value.numel() == 2


def only_hides(mask: Any, queries: int) -> bool:
    """Whether a mask [B or 1, 1, S, T] says of each key no more than whether it is seen."""
    if not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == queries):
        return False
    if mask.dtype == torch.bool:
        return True
    lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else None
    return lowest is not None and bool(((mask == 0) | (mask <= lowest)).all())


def update_cache(operator: str, cache: Any, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """`cache.update`, with UnsupportedError for a cache that is not known; without a cache what came in."""
    if cache is None:
        return keys, values
    from transformers.cache_utils import Cache

    if not isinstance(cache, Cache) or type(cache).update is not Cache.update or not hasattr(cache, "layers"):
        raise _unknown(operator, cache)
    keys, values = cache.update(keys, values, layer)
    kind = type(cache.layers[layer])  # some caches make their layers in `update`
    if f"{kind.__module__}.{kind.__qualname__}" not in CACHE_LAYERS:
        raise _unknown(operator, cache.layers[layer])
    return keys, values


def _unknown(operator: str, found: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{operator}: found a cache that it was not written for ({type(found).__module__}.{type(found).__qualname__}). "
        "Give it a DynamicCache, StaticCache or QuantizedCache of transformers, or leave attention to transformers "
        "(class: default)."
    )
