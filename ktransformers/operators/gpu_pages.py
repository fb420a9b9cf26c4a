"""Keys and values, or latents, in pages on a GPU, at fixed addresses: what kernels read, and graphs are captured over.

Where tokens lie, and how many there are, stands in the device's memory, once for all layers of a device (`Tables`): the
first layer of a step moves it on, and a replayed graph does so by itself. Python counts beside it. Sequences of a batch
have one length, and take pages in turn: growing appends pages, and what there is keeps its numbers. A sequence that is
shorter than its batch is filled up in front, and its first tokens are not seen. A layer with a window has pages for
what the window sees and BACK tokens more, by which it can go back; beyond, it begins with its first page again.
Letters: B sequences, T new tokens, C heads of keys and values, D and V sizes of a key and a value; of latents R and P.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ktransformers.errors import UnsupportedError
from ktransformers.kernels.context import Context
from ktransformers.kernels.mla_decode import group_of, numbers, row_bytes
from ktransformers.machine.streams import streams_of
from ktransformers.native.pages import PAGE
from ktransformers.operators import gpu_ops
from ktransformers.operators.decoding import decoder_of, decoding_of
from ktransformers.operators.fixed_cache import Captured
from ktransformers.operators.paged_cache import FP8, make_for_generation

LEAST_TOKENS = 1024
"""Of a new cache. Kernels read what is held, not what there is room for."""

FEW = 16
"""New tokens of a sequence up to which kernels compute a step; more are a prompt."""


BACK = 1024
"""Tokens that a window leaves behind and its layer keeps: an answer is often rendered otherwise in the next prompt."""


class Tables:
    """Where the tokens of B sequences are, for all layers of one device, or those of one window there."""

    def __init__(self, batch: int, room: int, ring: int, device: torch.device) -> None:
        """`ring`: after how many pages a sequence begins with its first again; 0 for never."""
        self.batch, self.ring, self.device = batch, ring, device
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._slots: dict[int, Tensor] = {}
        self._held, self._tokens = 0, 0  # what `lengths` says after all that was enqueued, and tokens of the last step
        self.grow(room)

    def grow(self, room: int) -> None:
        pages = torch.arange(room // PAGE, dtype=torch.int32, device=self.device)[None]
        pages = pages % self.ring if self.ring else pages
        self.table = pages * self.batch + torch.arange(self.batch, dtype=torch.int32, device=self.device)[:, None]
        self._tokens = 0

    def at(self, held: int) -> None:
        """`lengths` says `held`, and the next layer to enter is a step's first."""
        if self._held != held:
            self.lengths.fill_(held)
        self._held, self._tokens = held, 0

    def replays(self, tokens: int) -> None:
        """A graph that is enqueued next moves on by `tokens`."""
        self._held, self._tokens = self._held + tokens, tokens

    def unmoved(self, held: int) -> None:
        """What was enqueued since went into a graph, and was not done."""
        self._held, self._tokens = held, 0

    def enter(self, held: int, tokens: int) -> Tensor:
        """A layer that holds `held` tokens gets more: their slots [B * T]. The first one of a step makes them."""
        if (self._held, self._tokens) != (held + tokens, tokens):
            self.at(held)
            self.replays(tokens)
            if tokens not in self._slots:
                self._slots = {size: slots for size, slots in self._slots.items() if size <= FEW}
                self._slots[tokens] = torch.empty(self.batch * tokens, dtype=torch.int64, device=self.device)
            self.lengths.add_(tokens)
            gpu_ops.slots(self.table, self.lengths, self._slots[tokens])
        return self._slots[tokens]

    @property
    def context(self) -> Context:
        return Context(self.table, self.lengths)


class Room:
    """What the layers of a cache share."""

    def __init__(self, tokens: int) -> None:
        self.tokens = -(-tokens // PAGE) * PAGE
        self.tables: dict[tuple[torch.device, int, int], Tables] = {}
        self.masks: dict[int, tuple[Tensor, Tensor | None]] = {}
        """By window, the last mask that was read, and what gpu_attention.py read from it."""

    def reserve(self, tokens: int) -> bool:
        """Have room for so many tokens of each sequence; whether there was less."""
        if tokens <= self.tokens:
            return False
        while self.tokens < tokens:
            self.tokens *= 2
        for tables in self.tables.values():
            tables.grow(self.tokens)
        return True

    def tables_of(self, device: torch.device, batch: int, ring: int) -> Tables:
        key = device, batch, ring
        if key not in self.tables:
            self.tables[key] = Tables(batch, self.tokens, ring, device)
        return self.tables[key]


class GpuLayer(CacheLayerMixin):
    """One layer's pages: [pages, 64, C, D] and [pages, 64, C, V], or `joined` [pages, 64, R + P]. `window`: tokens that
    a token sees, itself included; 0 for all. `fp8`: joined rows are bytes, as kernels/mla_decode.py has them."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, room: Room, window: int = 0, joined: bool = False, fp8: bool = False) -> None:
        self.room, self.window, self.joined, self.fp8 = room, window, joined, fp8
        self.is_sliding = window > 0
        self.ring = -(-(window + BACK + FEW) // PAGE) + 1 if window else 0
        self.pages: tuple[Tensor, ...] = ()
        self.sizes: tuple[int, int, int] | None = None  # heads, and of a key and a value
        self.batch = self.length = 0
        self._most = 0  # tokens that were ever held since it was empty: later ones lie where the first did

    @property
    def is_initialized(self) -> bool:
        return self.sizes is not None

    @property
    def keys(self) -> Tensor | None:
        """A copy [B, C, T, D]; None before the first token."""
        return self.gathered()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self.gathered()[1] if self.is_initialized else None

    @property
    def tables(self) -> Tables:
        return self.room.tables_of(self.device, self.batch, self.ring)

    @property
    def group(self) -> int:
        """Latents with one scale; 0 where pages hold numbers."""
        return group_of(self.sizes[1]) if self.fp8 else 0

    @property
    def bytes_per_token(self) -> int:
        return sum(each[0, 0].nbytes for each in self.pages)

    @property
    def capacity(self) -> int:
        """Pages that a sequence has."""
        pages = self.room.tokens // PAGE
        return min(pages, self.ring) if self.ring else pages

    def prepare(
        self, batch: int, heads: int, size: int, value_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make pages at the first call. Raises UnsupportedError where they are of other sizes."""
        wanted = batch, (heads, size, value_size), dtype, device
        if self.sizes is None:
            self.batch, self.sizes, self.dtype, self.device = wanted
            self.pages = self._made()
        found = self.batch, self.sizes, self.dtype, self.device
        if found != wanted:
            raise UnsupportedError(
                "cache: found {} sequences, heads and sizes {} in {} on {}, ".format(*found)
                + "expected {}, {} in {} on {}. Give each model and batch a cache of its own.".format(*wanted)
            )

    def _made(self) -> tuple[Tensor, ...]:
        (heads, size, value_size), count = self.sizes, self.batch * self.capacity
        how = {"dtype": torch.uint8 if self.fp8 else self.dtype, "device": self.device}
        if self.joined:
            row = row_bytes(size, value_size, self.group) if self.fp8 else size + value_size
            return (torch.empty(count, PAGE, row, **how),)
        return tuple(torch.empty(count, PAGE, heads, width, **how) for width in (size, value_size))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.prepare(batch, heads, size, value_states.shape[3], key_states.dtype, key_states.device)

    def grow(self) -> None:
        """Have what room there is, elsewhere in memory."""
        old, self.pages = self.pages, self._made()
        for mine, theirs in zip(self.pages, old, strict=True):
            mine[: len(theirs)].copy_(theirs)

    def enter(self, tokens: int) -> Tensor:
        """So many tokens are about to be kept: their slots [B * T]. `advanced` moves `length` on once they are."""
        self.room.reserve(self.length + tokens)
        if len(self.pages[0]) < self.batch * self.capacity:
            self._refuse_capture("growing")
            self.grow()
        return self.tables.enter(self.length, tokens)

    def advanced(self, length: int) -> None:
        """So many tokens are held now."""
        self.length, self._most = length, max(self._most, length)

    def first_visible(self) -> int:
        """The first token that the next one sees."""
        return max(self.length - self.window + 1, 0) if self.window else 0

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """For code that knows no pages: [B, C, T, D] and [B, C, T, V] are kept; all that they see, in order."""
        self.lazy_initialization(key_states, value_states)
        self._refuse_capture("a copy of all that is held")
        tokens, given = key_states.shape[2], (key_states, value_states)
        before = self.gathered() if self.length and self.ring else None
        slots = self.enter(tokens).view(self.batch, tokens)
        kept = min(tokens, self.ring * PAGE) if self.ring else tokens
        rows = [x[:, :, tokens - kept :].transpose(1, 2).flatten(0, 1) for x in given]
        self._write(rows, slots[:, tokens - kept :].flatten())
        self.advanced(self.length + tokens)
        if not self.ring:
            return self.gathered()
        return given if before is None else tuple(torch.cat(pair, 2) for pair in zip(before, given, strict=True))

    def _write(self, rows: list[Tensor], slots: Tensor) -> None:
        """Keys [N, C, D] and values [N, C, V] to their slots."""
        if self.fp8:
            gpu_ops.keep_fp8(rows[0][:, 0], rows[1][:, 0], slots, self.pages[0], self.group)
            return
        if self.joined:
            rows = [torch.cat(rows, -1)[:, 0]]
        for page, row in zip(self.pages, rows, strict=True):
            page.flatten(0, 1).index_copy_(0, slots, row)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """All tokens that the next one sees, in order: [B, C, T, D] and [B, C, T, V]."""
        first, stop = self.first_visible(), -(-self.length // PAGE)
        begin = first // PAGE
        places = [each.unflatten(0, (-1, self.batch)) for each in self.pages]
        if self.ring:
            order = torch.arange(begin, stop, device=self.device) % self.ring
            places = [each.index_select(0, order) for each in places]
        else:
            places = [each[:stop] for each in places]
        within = slice(first - begin * PAGE, self.length - begin * PAGE)
        parts = [each.transpose(0, 1).flatten(1, 2)[:, within] for each in places]
        if self.fp8:
            parts = [numbers(parts[0], *self.sizes[1:], self.group).to(self.dtype)]
        if self.joined:
            parts = [part[:, :, None] for part in parts[0].split(self.sizes[1:], -1)]
        keys, values = (part.transpose(1, 2) for part in parts)
        return keys, values

    def _refuse_capture(self, what: str) -> None:
        streams = streams_of(self.device)
        if streams is not None and streams.is_capturing():
            raise UnsupportedError(f"cache: found {what} while a graph is captured, expected kernels on pages alone.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first_visible()
        return self.length - first + query_length, first

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = self._most = 0

    def offload(self) -> None:
        """Nothing: kernels read the pages where they are."""

    def prefetch(self) -> None:
        """Nothing."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}, expected minus the number of tokens to remove.")
        length = max(0, self.length + int(tokens_to_remove))
        if length and not self.can_forget(length):
            raise RuntimeError(f"crop: the window of {self.window} tokens has moved more than {BACK} tokens on.")
        self.length = length
        self._most = length and self._most

    def can_forget(self, length: int) -> bool:
        """Whether `crop` leaves the layer as if it had seen only the first `length` tokens."""
        first = max(length - self.window + 1, 0)
        held = not self.ring or first >= self._most - self.ring * PAGE
        return self.is_initialized and length <= self.length and held

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            chosen = indices.to(self.device)
            self.pages = tuple(
                each.unflatten(0, (-1, self.batch)).index_select(1, chosen).flatten(0, 1) for each in self.pages
            )
            self.batch = len(chosen)


class GpuPages(Captured, Cache):
    """A cache with a `GpuLayer` wherever kernels compute attention; a step is captured where they do in all layers.
    `plain`: whoever steps says that no token hides but by being later, or by a window."""

    def __init__(self, layers: list[Any], room: Room, plain: bool = False) -> None:
        super().__init__(layers=layers)
        self.room, self.plain = room, plain
        self.graphable = all(isinstance(layer, GpuLayer) for layer in layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(each.nbytes for layer in self.layers if isinstance(layer, GpuLayer) for each in layer.pages)

    def reserve(self, tokens: int) -> None:
        if self.room.reserve(tokens):
            self.graph, self.stepped = None, False  # kernels may be compiled anew, which cannot be captured
            for layer in self.layers:
                if isinstance(layer, GpuLayer) and layer.is_initialized:
                    layer.grow()

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        held = self.get_seq_length()
        for tables in self.room.tables.values():
            tables.at(held)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.advanced(held)
            for tables in self.room.tables.values():
                tables.unmoved(held)

    def replays(self, held: int) -> None:
        for tables in self.room.tables.values():
            tables.at(held)
            tables.replays(1)
        for layer in self.layers:
            layer.advanced(held + 1)


def gpu_pages(
    model: nn.Module, tokens: int | None = None, plain: bool = False, kind: str | None = None
) -> GpuPages | None:
    """A fresh cache for `model`, with room for so many tokens; None where kernels compute no layer's attention.

    `plain`: as `GpuPages` has it; None too where the family's code has other masks. `kind`: "fp8" keeps latents so;
    None is what `use` was told, any other the model's dtype.
    """
    computing = {module.layer_idx: module for module in model.modules() if getattr(module, "gpu", None) is not None}
    family = type(getattr(model, "orig_module", None) or model)
    if not computing or not GenerationMixin._supports_default_dynamic_cache.__func__(family):
        return None
    kept = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if plain and not _is_plain(model):
        return None
    room = Room(LEAST_TOKENS if tokens is None else tokens)
    layers = [_layer(layer, room, computing.get(number), kind) for number, layer in enumerate(kept)]
    return GpuPages(layers, room, plain) if any(isinstance(layer, GpuLayer) for layer in layers) else None


def _layer(kept: Any, room: Room, computing: nn.Module | None, kind: str | None) -> Any:
    """Pages in the place of a layer of transformers' cache, or that layer."""
    window = getattr(kept, "sliding_window", None) or 0
    if computing is None or type(kept) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return kept
    joined = computing.attending.joined
    fp8 = joined and (kind or computing.cache_kind) == FP8
    return kept if joined and window else GpuLayer(room, window, joined, fp8)  # of latents the kernel has no window


def use(model: nn.Module) -> None:
    """Let `model.generate` keep what it computes in `GpuPages` where kernels compute all its attention."""
    if any(getattr(module, "gpu", None) is not None for module in model.modules()):
        make_for_generation(model, gpu_pages)


def _is_plain(model: nn.Module) -> bool:
    """Whether each layer sees what is before it, within its window."""
    decoder = decoder_of(model)
    return decoder is not None and decoding_of(decoder) is not None
