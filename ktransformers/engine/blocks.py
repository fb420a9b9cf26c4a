"""A block: what a cache keeps of 64 tokens in a row, in every layer; taken from one cache and given to another.

Of a layer of pages that is the page, which caches share, and keys of an index, where it has one. Layers with states
keep no history: what such a layer is after the last token of a block is there only where somebody had it copied just
then. A sliding window lacks the page of a block that it has left behind. So a prefix can be gone on from only at some
of its blocks, and `longest` says at which.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DummyLayer

from ktransformers.engine.block_files import BlockDamaged, Header
from ktransformers.errors import is_whole
from ktransformers.native.pages import PAGE, Page, Pages
from ktransformers.operators.delta_net import LinearAttentionLayer
from ktransformers.operators.paged_cache import (
    PagedCache,
    PagedIndexedLayer,
    PagedLayer,
    kept_sizes,
    paged_cache,
)

_PAGED = frozenset(kind for kind in (PagedLayer, *PagedLayer.__subclasses__()))
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Form:
    """How a layer of pages keeps a token. `index`: dtype and width of the index's key, or None."""

    type: str
    heads: int
    size: int
    value_size: int
    joined: bool
    window: int
    dtype: str
    index: tuple[str, int] | None


@dataclass(frozen=True)
class State:
    """One of the states of a layer: input of its convolution and what recurs, one of which may be None; the width of
    the convolution; what transformers' `has_previous_state` was."""

    conv: Tensor | None
    recurrent: Tensor | None
    width: int | None
    seen: bool

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.conv, self.recurrent) if tensor is not None]


@dataclass(eq=False, slots=True)
class Block:
    """64 tokens behind the block `parent`. Of each layer: its page or None, keys of its index [1, 64, I] or None, and
    after the last block of a prompt that was copied, its states. `ids`: int64 each. `below`: how many follow it."""

    key: bytes
    parent: bytes
    ids: bytes
    pages: list[Page | None]
    index: list[Tensor | None]
    states: list[tuple[State, ...]] | None = None
    missing: frozenset[int] = frozenset()
    """Windows of layers whose page is not here."""
    below: int = 0

    @property
    def copies(self) -> Iterator[Tensor]:
        """What belongs to this block alone."""
        yield from (keys for keys in self.index if keys is not None)
        yield from (tensor for layer in self.states or () for state in layer for tensor in state.tensors)

    @property
    def nbytes(self) -> int:
        pages = sum(page.data.nbytes for page in self.pages if page is not None)
        return pages + sum(tensor.nbytes for tensor in self.copies)

    @property
    def freed(self) -> int:
        """Bytes that are free when this block is: pages in nobody's table, and what belongs to it alone."""
        alone = sum(page.data.nbytes for page in self.pages if page is not None and page.users == 1)
        return alone + sum(tensor.nbytes for tensor in self.copies)

    def use(self, by: int) -> None:
        """Count it as one user more, or less, of its pages."""
        for page in self.pages:
            if page is not None:
                page.users += by


@dataclass(frozen=True)
class Source:
    """One sequence of a cache that blocks can be taken from."""

    layers: Sequence[Any]
    row: int
    length: int

    def page(self, layer: int, at: int) -> Page | None:
        return self.layers[layer].pages.tables[self.row][at]


class Caches:
    """The caches of one model: what their layers are, blocks of them, and caches made of blocks.

    `usable` is False where not all of a cache is pages and states on the CPU; then nothing else here may be called.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = paged_cache(model)
        layers = [] if empty is None else empty.layers
        self._empty = empty
        self.paged = [i for i, layer in enumerate(layers) if type(layer) in _PAGED]
        self.stateful = [i for i, layer in enumerate(layers) if type(layer) is LinearAttentionLayer]
        dummies = sum(type(layer) is DummyLayer for layer in layers)
        self.usable = bool(self.paged) and len(self.paged) + len(self.stateful) + dummies == len(layers)
        self.windows = frozenset(layers[i].window for i in self.paged if layers[i].window)
        sizes = kept_sizes(model)
        self._sizes = [sizes[i] for i in self.paged]
        self._forms: list[Form] | None = None  # of self.paged, known from the first cache or block on
        self._page_bytes: list[int] = []
        self._described: list[tuple] = []  # the same, for files

    @property
    def anywhere(self) -> bool:
        """Whether each block can be gone on from."""
        return not self.windows and not self.stateful

    def longest(self, chain: Sequence[tuple[frozenset[int], bool]]) -> int:
        """How many of these blocks in a row, from the first on, a cache can be made of: of each, the windows that it
        lacks, and whether it has states."""
        best, since = 0, dict.fromkeys(self.windows, 0)
        for count, (missing, states) in enumerate(chain, 1):
            since.update(dict.fromkeys(missing, count))
            held = all(first <= seen_from(count * PAGE, window) // PAGE for window, first in since.items())
            if held and (states or not self.stateful):
                best = count
        return best

    # --- from a cache -----------------------------------------------------------------------------------

    def source(self, cache: Any, row: int) -> Source | None:
        """Sequence `row` of `cache`; None where blocks of this model cannot be taken from it."""
        if not self.usable or type(cache) is not PagedCache or len(cache.layers) != len(self._empty.layers):
            return None
        if any(type(one) is not type(own) for one, own in zip(cache.layers, self._empty.layers, strict=True)):
            return None
        paged = [cache.layers[i] for i in self.paged]
        if any(layer.pages is None or row >= len(layer.pages.tables) for layer in paged):
            return None
        lengths = {layer.pages.lengths[row] for layer in paged}
        lengths |= {keys.shape[1] for layer in paged if (keys := _index(layer)) is not None}
        if len(lengths) != 1 or not self._fits([_form(layer) for layer in paged]):  # unequal where a step was torn
            return None
        return Source(cache.layers, row, lengths.pop())

    def take(self, source: Source, at: int, parent: bytes, key: bytes, ids: bytes, states: bool) -> Block:
        """Block number `at` of a sequence, whose pages it counts itself a user of. `states`: with them, where they are
        just those after it."""
        count = len(source.layers)
        block = Block(key, parent, ids, [None] * count, [None] * count)
        for i in self.paged:
            block.pages[i], keys = source.page(i, at), _index(source.layers[i])
            if keys is not None:
                block.index[i] = _copied(keys[source.row : source.row + 1, at * PAGE : (at + 1) * PAGE])
        block.states = self._states(source, at) if states else None
        block.missing = self._missing(block.pages)
        block.use(1)
        return block

    def complete(self, block: Block, source: Source, at: int, states: bool) -> bool:
        """Take what the block still lacks; whether there was any of that."""
        lacking = [i for i in self.paged if block.pages[i] is None] if block.missing else []
        found = {i: page for i in lacking if (page := source.page(i, at)) is not None}
        for i, page in found.items():
            block.pages[i] = page
            page.users += 1
        block.missing = self._missing(block.pages) if found else block.missing
        copied = self._states(source, at) if states and block.states is None else None
        block.states = block.states or copied
        return bool(found) or copied is not None

    def _missing(self, pages: Sequence[Page | None]) -> frozenset[int]:
        return frozenset(self._empty.layers[i].window for i in self.paged if pages[i] is None)

    def _states(self, source: Source, at: int) -> list[tuple[State, ...]] | None:
        if not self.stateful or source.length != (at + 1) * PAGE:
            return None
        layers = [source.layers[i] for i in self.stateful]
        found = [tuple(_state(layer, n, source.row) for n in range(layer.number_of_states)) for layer in layers]
        return found if all(state.tensors for each in found for state in each) else None

    def _fits(self, forms: list[Form]) -> bool:
        """Whether a cache of these forms is one of this model as others are; what they are is known from the first."""
        if self._forms is None:
            own = [self._empty.layers[i] for i in self.paged]
            made = [_pages(*each) for each in zip(forms, own, self._sizes, strict=True)]
            if None in made:
                return False
            self._page_bytes, self._forms = [pages.page_bytes for pages in made], forms
        return self._forms == forms

    # --- to a cache -------------------------------------------------------------------------------------

    def filled(self, blocks: Sequence[Block]) -> PagedCache:
        """A cache of the tokens of `blocks`, as many as `longest` allows, as if it had computed them."""
        cache, length = PagedCache([_fresh(layer) for layer in self._empty.layers]), len(blocks) * PAGE
        for i, form in zip(self.paged, self._forms, strict=True):
            layer = cache.layers[i]
            pages = layer.prepare(form.heads, form.size, form.value_size, _DTYPES[form.dtype])
            first = seen_from(length, form.window)
            gone = first // PAGE
            pages.hold([None] * gone + [block.pages[i] for block in blocks[gone:]], length, first)
            if form.index is not None:
                layer.update_indexer(torch.cat([block.index[i] for block in blocks], 1))
        for i, states in zip(self.stateful, blocks[-1].states or (), strict=bool(self.stateful)):
            for number, state in enumerate(states):
                _restore(cache.layers[i], number, state)
        return cache

    # --- to and from files ------------------------------------------------------------------------------

    def parts(self, block: Block) -> tuple[Header, list[memoryview]]:
        """What says how a block's file is to be read, and its bytes."""
        forms = [astuple(form) for form in self._forms] if not self._described else self._described
        self._described = forms
        layers = [[form, block.pages[i] is not None] for i, form in zip(self.paged, forms, strict=True)]
        states = None if block.states is None else [[_described(s) for s in layer] for layer in block.states]
        tensors = [page.data for page in block.pages if page is not None] + list(block.copies)
        header = {"parent": block.parent.hex(), "ids": block.ids.hex(), "layers": layers, "states": states}
        return header, [_bytes_of(tensor) for tensor in tensors]

    def described(self, header: Header) -> tuple[frozenset[int], bool]:
        """What `longest` wants to know of a block in a file, of which only reading the whole says that it is sound."""
        try:
            forms = [Form(*form) for form, page in header["layers"] if not page]
            return frozenset(form.window for form in forms), header["states"] is not None
        except (KeyError, TypeError, ValueError):
            return frozenset(), True  # who reads it will see

    def empty_block(self, header: Header) -> Block:
        """The block of a file, with memory for its bytes. Raises BlockDamaged for what is no block of this model."""
        try:
            return self._empty_block(header)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
            raise BlockDamaged("a block in a file does not fit the model.") from error

    def _empty_block(self, header: Header) -> Block:
        forms = [Form(*form[:-1], form[-1] and tuple(form[-1])) for form, _ in header["layers"]]
        if len(forms) != len(self.paged) or not self._fits(forms):
            raise ValueError("other layers")
        count, names = len(self._empty.layers), ("key", "parent", "ids")
        block = Block(*(bytes.fromhex(header[name]) for name in names), [None] * count, [None] * count)
        held = [bool(page) for _, page in header["layers"]]
        for i, form, nbytes, there in zip(self.paged, forms, self._page_bytes, held, strict=True):
            if there:
                block.pages[i] = Page(torch.empty(nbytes, dtype=torch.uint8, device="cpu"))
            if form.index is not None:
                block.index[i] = _empty_tensor(form.index[0], [1, PAGE, form.index[1]])
        block.missing = self._missing(block.pages)
        if header["states"] is not None:
            block.states = [tuple(_empty_state(*state) for state in layer) for layer in header["states"]]
        if block.missing - self.windows or len(block.states or self.stateful) != len(self.stateful):
            raise ValueError("other parts")
        return block

    def buffers(self, block: Block) -> list[memoryview]:
        """Where the bytes of the file of a block go, in its order."""
        tensors = [page.data for page in block.pages if page is not None] + list(block.copies)
        return [_bytes_of(tensor) for tensor in tensors]


def seen_from(length: int, window: int) -> int:
    """The first token that number `length` sees of those before it."""
    return max(length - window + 1, 0) if window else 0


def _index(layer: PagedLayer) -> Tensor | None:
    return layer.indexer_keys if isinstance(layer, PagedIndexedLayer) else None


def _form(layer: PagedLayer) -> Form | None:
    pages, keys = layer.pages, _index(layer)
    index = None if keys is None else (_NAMES.get(keys.dtype, ""), keys.shape[-1])
    sizes = pages.heads, pages.size, pages.value_size
    return Form(pages.kind, *sizes, pages.joined, pages.window, _NAMES.get(layer.dtype, ""), index)


def _pages(form: Form, layer: PagedLayer, sizes: tuple[int, int, int]) -> Pages | None:
    """What `layer`, which is empty, makes of such a form; None where it is another's."""
    if form.dtype not in _DTYPES or (form.heads, form.size, form.value_size) != sizes:
        return None
    if form.index is not None and (form.index[0] not in _DTYPES or not isinstance(layer, PagedIndexedLayer)):
        return None
    pages = _fresh(layer).prepare(*sizes, _DTYPES[form.dtype])
    same = (pages.kind, pages.joined, pages.window) == (form.type, form.joined, form.window)
    return pages if same else None


def _fresh(layer: Any) -> Any:
    """Another empty layer; one of pages is empty in its own attributes, and copied so in a tenth of the time."""
    return copy.copy(layer) if type(layer) in _PAGED else copy.deepcopy(layer)


def _state(layer: Any, number: int, row: int) -> State:
    """A copy of state `number` of sequence `row`."""
    conv, recurrent, width = layer.conv_states[number], layer.recurrent_states[number], layer.conv_kernel_size[number]
    if conv is not None:  # a layer that records its past keeps more
        conv = _copied(conv[row : row + 1, ..., -width:])
    if recurrent is not None:
        recurrent = _copied(recurrent[row : row + 1])
    return State(conv, recurrent, width, layer.has_previous_state[number])


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _restore(layer: Any, number: int, state: State) -> None:
    if state.conv is not None:
        layer.update_conv_state(state.conv, number, conv_kernel_size=state.width)
    if state.recurrent is not None:
        layer.update_recurrent_state(state.recurrent, number)
    layer.has_previous_state[number] = state.seen


def _described(state: State) -> list[Any]:
    """A state without its numbers, for a file's header."""
    return [None if t is None else [_NAMES[t.dtype], list(t.shape)] for t in (state.conv, state.recurrent)] + [
        state.width, bool(state.seen),
    ]  # fmt: skip


def _empty_state(conv: Any, recurrent: Any, width: int | None, seen: bool) -> State:
    return State(*(None if each is None else _empty_tensor(*each) for each in (conv, recurrent)), width, seen)


def _empty_tensor(dtype: str, shape: Sequence[int]) -> Tensor:
    """Memory for a tensor of a file. Raises ValueError for sizes that no cache has."""
    if not all(is_whole(size, 1, 1 << 28) for size in shape) or math.prod(shape) > 1 << 28:
        raise ValueError("sizes of no sense")
    return torch.empty(list(shape), dtype=_DTYPES[dtype], device="cpu")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
