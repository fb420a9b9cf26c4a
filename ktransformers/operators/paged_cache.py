"""The KV cache of attention operators on the CPU: pages under transformers' Cache interface.

`PagedCache` holds a layer of pages for every module that computes on pages, and transformers' own layer for the others.
Any code of transformers may use it: `update` appends and gives back what attention shall see, as tensors; an operator
that knows pages never asks for that. Going back, choosing beams and copying move tables of pages, not keys.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from ktransformers.errors import UnsupportedError
from ktransformers.native.pages import TYPES, Pages

_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


FP8 = "fp8"
"""How pages of a GPU can keep latents (gpu_pages.py); pages of the CPU cannot."""


class PagedLayer(CacheLayerMixin):
    """Keys [B, C, T, D] and values [B, C, T, V] of one layer, appended to in place. `kind`: one of
    `native.pages.TYPES`, or None for the dtype of what comes first. `joined`: as `Pages` has it."""

    is_sliding = False
    window = 0
    """Tokens that a token sees, itself included; 0 for all."""
    is_croppable = True
    supports_early_init = False

    def __init__(self, kind: str | None = None, joined: bool = False) -> None:
        self.kind, self.joined, self.pages, self.dtype = kind, joined, None, torch.float32
        self.device = torch.device("cpu")

    @property
    def is_initialized(self) -> bool:
        return self.pages is not None

    @property
    def keys(self) -> Tensor | None:
        """A copy of what is held, as transformers' layers keep it; None before the first token."""
        return self._gathered()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self._gathered()[1] if self.is_initialized else None

    def prepare(self, heads: int, size: int, value_size: int, dtype: torch.dtype) -> Pages:
        """The pages, made for these sizes at the first call. Raises UnsupportedError where they have others."""
        if self.pages is None:
            self.dtype = dtype
            kind = self.kind or _KINDS.get(dtype)
            if kind is None:
                raise UnsupportedError(
                    f"cache: found {dtype}, expected float32, float16 or bfloat16. Give the model such a dtype, or a "
                    "DynamicCache of transformers as past_key_values."
                )
            self.pages = Pages(kind, heads, size, value_size, joined=self.joined, window=self.window)
        held, wanted = (self.pages.heads, self.pages.size, self.pages.value_size), (heads, size, value_size)
        if held != wanted:
            found, expected = ("{} heads of {} and {} values".format(*sizes) for sizes in (held, wanted))
            raise UnsupportedError(
                f"cache: found {found}, expected {expected}. It was filled by another model; give each its own."
            )
        return self.pages

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.device.type != "cpu":
            raise UnsupportedError(
                f"cache: found keys on {key_states.device}, expected them on the cpu: pages are memory of the CPU. "
                "Give the model a DynamicCache of transformers."
            )
        self.prepare(key_states.shape[1], key_states.shape[3], value_states.shape[3], key_states.dtype)

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.pages is None:
            self.lazy_initialization(key_states, value_states)
        first = self.first_visible()
        self.pages.append(key_states, value_states)
        both = self._gathered(first)
        self.advanced()
        return both

    def _gathered(self, first: int | None = None) -> tuple[Tensor, Tensor]:
        if not self.pages.tables:
            return tuple(torch.empty(0, dtype=self.dtype, device="cpu") for _ in range(2))
        keys, values = self.pages.gathered(max(self.pages.held_from, default=0) if first is None else first)
        return keys.to(self.dtype), values.to(self.dtype)

    def first_visible(self) -> int:
        """The first token that the next one sees."""
        return 0

    def advanced(self) -> None:
        """After tokens were appended."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.refuse_ragged()
        return self.get_seq_length() + query_length, 0

    def refuse_ragged(self) -> None:
        """Raises UnsupportedError where sequences have different lengths, of which transformers' code knows nothing."""
        if self.pages is not None and self.pages.ragged:
            least, most = min(self.pages.lengths), max(self.pages.lengths)
            raise UnsupportedError(
                f"cache: found sequences of {least} to {most} tokens in one batch; only a model whose layers are all "
                "native takes them, with position_ids and without a mask. Give sequences of one length, padded on the "
                "left, or one at a time."
            )

    def get_seq_length(self) -> int:
        return 0 if self.pages is None else self.pages.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.pages is not None:
            self.pages.clear()

    def offload(self) -> None:
        """Nothing: the pages are on the CPU."""

    def prefetch(self) -> None:
        """Nothing."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}, expected minus the number of tokens to remove.")
        if tokens_to_remove and self.pages is not None:
            self.pages.cut([max(0, length + tokens_to_remove) for length in self.pages.lengths])

    def can_forget(self, length: int) -> bool:
        """Whether `crop` leaves the layer as if it had seen only the first `length` tokens."""
        return self.pages is not None and length <= self.pages.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pages is not None and self.pages.tables:
            self.pages.choose([i for i in range(len(self.pages.tables)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pages is not None and self.pages.tables:
            chosen = torch.arange(len(self.pages.tables), device="cpu")[indices.cpu()]
            self.pages.choose(chosen.tolist())


class PagedWindowLayer(PagedLayer):
    """The same where a token sees only the last `sliding_window`: pages that no coming token sees are given back."""

    is_sliding = True

    def __init__(self, sliding_window: int, kind: str | None = None, joined: bool = False) -> None:
        super().__init__(kind, joined)
        self.sliding_window = self.window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep what the window leaves behind until the next `crop`."""
        self.record_past = True

    def first_visible(self) -> int:
        return max(self.get_seq_length() - self.sliding_window + 1, 0)

    def advanced(self) -> None:
        if not self.record_past:
            shortest = min(self.pages.lengths) if self.pages.ragged else self.pages.length
            self.pages.drop(max(shortest - self.sliding_window + 1, 0))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.refuse_ragged()
        first = self.first_visible()
        return self.get_seq_length() - first + query_length, first

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length() - abs(tokens_to_remove)
        if tokens_to_remove and self.pages is not None and not self.can_forget(length):
            raise RuntimeError(
                f"crop: the window of {self.sliding_window} tokens has moved on and holds nothing before token "
                f"{max(self.pages.held_from)}. Call activate_past_recording before the tokens that may be taken back."
            )
        super().crop(tokens_to_remove)
        if self.pages is not None:
            self.pages.drop(self.first_visible())

    def can_forget(self, length: int) -> bool:
        if not super().can_forget(length):
            return False
        return max(self.pages.held_from, default=0) <= max(length - self.sliding_window + 1, 0)


class PagedIndexedLayer(PagedLayer):
    """The same with a key [B, T, I] of each token besides, for an index over keys, as DynamicIndexedLayer has it."""

    def __init__(self, kind: str | None = None, joined: bool = False) -> None:
        super().__init__(kind, joined)
        self._index: Tensor | None = None  # [B, room, I], its length doubled where it has to grow
        self._indexed = 0

    @property
    def indexer_keys(self) -> Tensor | None:
        """[B, T, I]; None before the first token."""
        return None if self._index is None else self._index[:, : self._indexed]

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """[B, S, I], appended -> [B, T, I]."""
        after = self._indexed + indexer_key_states.shape[1]
        if self._index is None or after > self._index.shape[1]:
            batch, _, width = indexer_key_states.shape
            grown = indexer_key_states.new_empty(batch, max(after, 2 * self._indexed), width)
            if self._index is not None:
                grown[:, : self._indexed] = self.indexer_keys
            self._index = grown
        self._index[:, self._indexed : after] = indexer_key_states
        self._indexed = after
        return self.indexer_keys

    def align(self) -> None:
        """Forget keys of tokens that are not in the pages: a step that failed leaves some."""
        self._indexed = min(self._indexed, self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self._index, self._indexed = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.align()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._index is not None:
            self._index = self._index.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._index is not None:
            self._index = self._index[indices.to(self._index.device)]


class PagedCache(Cache):
    """A cache with a `PagedLayer` wherever an operator computes on pages."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, and of keys for indices."""
        held = [layer for layer in self.layers if isinstance(layer, PagedLayer) and layer.pages]
        keys = [layer.indexer_keys for layer in held if isinstance(layer, PagedIndexedLayer)]
        return sum(layer.pages.nbytes for layer in held) + sum(key.nbytes for key in keys if key is not None)

    @classmethod
    def together(cls, caches: Sequence["PagedCache"]) -> "PagedCache":
        """One cache of the sequences of all `caches`, of any lengths, to decode them as a batch. They share pages until
        somebody writes. Raises UnsupportedError for layers that are not pages, or are empty."""
        made = []
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            if not all(isinstance(layer, PagedLayer) and layer.pages is not None for layer in layers):
                raise UnsupportedError("cache: found layers without pages, expected caches that native layers filled.")
            layer = copy.copy(layers[0])
            layer.pages = Pages.together([each.pages for each in layers])
            made.append(layer)
        return cls(made)

    def alone(self, i: int) -> "PagedCache":
        """A cache of sequence `i`, which shares pages until somebody writes."""
        made = []
        for layer in self.layers:
            if type(layer) in (PagedLayer, PagedWindowLayer) and layer.pages is not None:
                other = copy.copy(layer)
                other.pages = layer.pages.alone(i)
            else:
                other = copy.deepcopy(layer)
                other.batch_select_indices(torch.tensor([i], device="cpu"))
            made.append(other)
        return type(self)(made)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and the window of each layer, as DynamicCache has it; keys and values are copies."""
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield layer.keys, layer.values, None if window is None else torch.tensor(window, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        """Another of the same tokens; the two share pages until one of them writes."""
        other = type(self)([copy.deepcopy(layer, memo) for layer in self.layers])
        memo[id(self)] = other
        return other


def paged_cache(model: nn.Module, kind: str | None = None) -> PagedCache | None:
    """A fresh cache for `model`, or None where no operator of it computes on pages.

    `kind`: how pages keep keys and values: "f32", "f16", "bf16" or "q8_0"; None, and "fp8", which pages of the CPU do
    not take, is what `use` was told, else the model's dtype. Raises UnsupportedError for another.
    """
    check_kind(kind)
    kind = None if kind == FP8 else kind
    paged = {module.layer_idx: module for module in _paged_layers(model)}
    # By the name of the class, as transformers tells who brings a cache of its own (MiniMax, the first one).
    family = type(getattr(model, "orig_module", None) or model)
    if not paged or not GenerationMixin._supports_default_dynamic_cache.__func__(family):
        return None
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    for number, module in paged.items():
        layer = layers[number] if number < len(layers) else None
        how = kind or module.cache_kind, module.attending.joined
        if type(layer) is DynamicSlidingWindowLayer:
            layers[number] = PagedWindowLayer(layer.sliding_window, *how)
        elif type(layer) is DynamicLayer:
            layers[number] = PagedLayer(*how)
        elif type(layer) is DynamicIndexedLayer:
            layers[number] = PagedIndexedLayer(*how)
    return PagedCache(layers)


def check_kind(kind: str | None) -> None:
    """Raise UnsupportedError where pages cannot keep `kind`; None, the model's dtype, they can."""
    if kind is not None and kind not in (*TYPES, FP8):
        raise UnsupportedError(
            f"cache: found type {kind!r}, expected one of {', '.join((*TYPES, FP8))}. Choose one, or leave it out for "
            "the model's dtype."
        )


def kept_sizes(model: nn.Module) -> dict[int, tuple[int, int, int]]:
    """What each layer that computes on pages keeps of a token: heads, and the sizes of their keys and values."""
    return {module.layer_idx: module.attending.kept for module in _paged_layers(model)}


def _paged_layers(model: nn.Module) -> Iterator[Any]:
    """The attention of each layer that computes on pages."""
    return (module for module in model.modules() if getattr(module, "computes_on_pages", False))


def use(model: nn.Module, kind: str | None = None) -> None:
    """Let `model.generate` make a `PagedCache` where it would make a DynamicCache; `kind`: as `paged_cache` has it.

    Warns where layers do not compute on pages, as their cache does not take `kind`. Raises NativeError for a kind
    that the model's heads do not fill in whole blocks.
    """
    if kind is not None:
        _choose(model, kind)
    if next(_paged_layers(model), None) is not None:
        make_for_generation(model, paged_cache)


def make_for_generation(model: nn.Module, make: Callable[[nn.Module], Cache | None]) -> None:
    """Let `model.generate` take `make(model)`, where that is not None, where it would make a DynamicCache."""
    original = getattr(model, "_prepare_cache_for_generation", None)
    if original is None:
        return

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        plain = generation_config.cache_implementation in (None, "dynamic") and generation_config.use_cache is not False
        if plain and model_kwargs.get("past_key_values") is None and model._supports_default_dynamic_cache():
            model_kwargs["past_key_values"] = make(model)
            if model_kwargs["past_key_values"] is not None:
                return None
        return original(generation_config, model_kwargs, *args, **kwargs)

    model._prepare_cache_for_generation = prepare


def _choose(model: nn.Module, kind: str) -> None:
    """Have `paged_cache` keep keys and values of `model` as `kind`."""
    check_kind(kind)
    paged = _latents_on_gpu(model) if kind == FP8 else list(_paged_layers(model))
    for module in paged:
        if kind != FP8:
            PagedLayer(kind).prepare(*module.attending.kept, torch.float32)  # raises what it would later
        module.cache_kind = kind
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    kept = len(paged) if kind == FP8 else _takes(model, kind)
    what = "have no kernels for latents on a GPU" if kind == FP8 else "do not compute on pages of the CPU"
    if kept < layers:
        warnings.warn(
            f"cache: {layers - kept} of {layers} layers {what}, so their cache stays as it is made otherwise and not "
            f"{kind}",
            stacklevel=3,
        )


def _latents_on_gpu(model: nn.Module) -> list[Any]:
    """The attention of each layer that kernels compute on latents."""
    return [m for m in model.modules() if getattr(m, "gpu", None) is not None and m.attending.joined]


def _takes(model: nn.Module, kind: str) -> int:
    """How many layers of a fresh cache keep keys and values as `kind`."""
    cache = paged_cache(model)
    return sum(isinstance(layer, PagedLayer) and layer.kind == kind for layer in cache.layers) if cache else 0
