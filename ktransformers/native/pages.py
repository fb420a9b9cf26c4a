"""Keys and values of the sequences of one layer, in pages of 64 tokens that are appended to in place and never moved.

A page belongs to one layer and holds all of its heads: first the keys, [C, 64, D], then the values, [C, 64, V]; or, of
latent attention, `joined`, rows of both: [C, 64, D + V]. Several sequences, and several caches, may share one; whoever
would write to a shared page takes a copy first. Nothing here computes. Letters: B sequences, C heads of keys and
values, T tokens, D and V sizes of a key and a value.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.encode import encode
from ktransformers.native.library import loaded
from ktransformers.quants.blocks import Packed, quant_type

PAGE = 64
"""Tokens of a page, KT_PAGE of native/src/attention/attend.h; a test holds them together."""

TYPES = {"f32": 0, "f16": 1, "bf16": 2, "q8_0": 3}
"""How keys and values can be kept, with the numbers of kt_dtype and kt_cache."""
TORCH_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Page:
    """The memory of one page, and how many tables it is in."""

    __slots__ = ("data", "users")

    def __init__(self, data: Tensor) -> None:
        self.data, self.users = data, 0


class Pages:
    """The pages of B sequences in one layer. Made empty; the first tokens say how many sequences there are.

    `room`: up to which length of the first sequence nothing has to be done before tokens are written; 0: ask
    `make_room`. `ragged`: whether sequences are of different lengths. `window`: tokens that a query sees, itself
    included; 0 for all. `held_from`: the first token of each sequence that is held.
    """

    def __init__(
        self, kind: str, heads: int, size: int, value_size: int, name: str = "cache", joined: bool = False,
        window: int = 0,
    ) -> None:  # fmt: skip
        """`kind`: one of TYPES. `joined`: a token's value lies behind its key, in one row of a page. Raises
        NativeError for another, or for q8_0 of sizes that are not multiples of 32."""
        if kind not in TYPES:
            raise NativeError(f"{name}: found type {kind!r}, expected one of {', '.join(TYPES)}.")
        self.kind, self.heads, self.size, self.value_size, self.name = kind, heads, size, value_size, name
        self.joined, self.window = joined, window
        self.held_from: list[int] = []
        self._padded: tuple[int, ...] | None = None
        self._type = quant_type(kind.upper())
        if size % self._type.block or value_size % self._type.block:
            raise NativeError(
                f"{name}: found heads of {size} and {value_size} values, expected multiples of {self._type.block} to "
                f"keep them as {kind}. Keep them as bf16, f16 or f32."
            )
        self._state = loaded()
        key_row, value_row = self._type.row_bytes(size), self._type.row_bytes(value_size)
        self.page_bytes = heads * PAGE * (key_row + value_row)
        if joined:  # for C one row, whose parts it knows
            key_row = value_row = key_row + value_row
        self.values_at = 0 if joined else heads * PAGE * key_row
        self.layout = self._state.ffi.new("kt_kv_layout *", {
            "type": TYPES[kind], "key_row": key_row, "value_row": value_row,
            "key_head": PAGE * key_row, "value_head": PAGE * value_row,
        })[0]  # fmt: skip
        self.room, self.ragged = 0, False
        self.tables: list[list[Page | None]] = []
        self.sequences: Any = self._state.ffi.NULL
        self._pointers: list[tuple[Any, Any]] = []
        self.number = torch_ops.name_it(self)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; C raises them."""
        return [self.sequences[i].length for i in range(len(self.tables))]

    @property
    def length(self) -> int:
        """Tokens of the first sequence: of each, where they are not ragged."""
        return self.sequences[0].length if self.tables else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, each counted once."""
        return self.page_bytes * len({id(page) for table in self.tables for page in table if page is not None})

    # --- growing ----------------------------------------------------------------------------------------

    def make_room(self, batch: int, tokens: int) -> None:
        """Have pages of their own for the next `tokens` tokens of each of `batch` sequences."""
        if not self.tables:
            self._set([[] for _ in range(batch)], [0] * batch, [0] * batch)
        elif len(self.tables) != batch:
            raise NativeError(f"{self.name}: found {batch} sequences, expected the {len(self.tables)} that it holds.")
        if self.length + tokens <= self.room:
            return
        for i, length in enumerate(self.lengths):
            table = self.tables[i]
            at = length // PAGE
            if length % PAGE and table[at].users > 1:
                self._replace(i, at, Page(table[at].data.clone()))
            if length + tokens > len(table) * PAGE:
                self._extend(i, -(-(length + tokens) // PAGE))
        spare = (len(table) * PAGE - n for table, n in zip(self.tables, self.lengths, strict=True))
        self.room = self.length + min(spare)  # all grow by as much

    def _extend(self, i: int, count: int) -> None:
        table = self.tables[i]
        room = len(self._pointers[i][0])
        if count > room:  # doubled, so that a table is made anew a few times only
            self._point(i, max(count, 2 * room))
        while len(table) < count:
            table.append(None)
            self._replace(i, len(table) - 1, Page(torch.empty(self.page_bytes, dtype=torch.uint8, device="cpu")))

    def _replace(self, i: int, at: int, page: Page | None) -> None:
        """Put `page` into a table, or nothing."""
        old, self.tables[i][at] = self.tables[i][at], page
        if old is not None:
            old.users -= 1
        if page is not None:
            page.users += 1
        cast, address = self._state.ffi.cast, 0 if page is None else page.data.data_ptr()
        keys, values = self._pointers[i]
        keys[at] = cast("void *", address)
        values[at] = cast("void *", address and address + self.values_at)

    def _set(self, tables: list[list[Page | None]], lengths: Sequence[int], held_from: Sequence[int]) -> None:
        """Take `tables` as they are, with pointers for C made anew."""
        for page in (page for table in tables for page in table if page is not None):
            page.users += 1
        for page in (page for table in self.tables for page in table if page is not None):
            page.users -= 1
        new = self._state.ffi.new
        self.tables, self.room = [list(table) for table in tables], 0
        self.held_from, self._padded, self.ragged = list(held_from), None, len(set(lengths)) > 1
        self.sequences = new("kt_sequence[]", max(1, len(tables)))
        self._pointers = [None] * len(tables)
        for i, length in enumerate(lengths):
            self._point(i, max(1, len(tables[i])))
            self.sequences[i].length, self.sequences[i].start = length, held_from[i]

    def _point(self, i: int, room: int) -> None:
        """Pointers of sequence `i`, with room for that many pages."""
        new, cast = self._state.ffi.new, self._state.ffi.cast
        keys, values = new("void *[]", room), new("void *[]", room)
        for at, page in enumerate(self.tables[i]):
            if page is not None:
                address = page.data.data_ptr()
                keys[at], values[at] = cast("void *", address), cast("void *", address + self.values_at)
        self._pointers[i] = keys, values
        self.sequences[i].keys, self.sequences[i].values = keys, values

    # --- going back, sharing, choosing ------------------------------------------------------------------

    def pad(self, counts: tuple[int, ...] | None) -> None:
        """From now on the first `counts[i]` tokens of sequence i are seen by none; None: those that are held are."""
        if counts == self._padded:
            return
        self._padded = counts
        for i, first in enumerate(self.held_from):
            self.sequences[i].start = max(first, counts[i] if counts else 0)

    def cut(self, lengths: int | Sequence[int]) -> None:
        """Forget all but the first so many tokens of each sequence, the same of all or each its own."""
        lengths = [lengths] * len(self.tables) if isinstance(lengths, int) else list(lengths)
        kept = [table[: -(-length // PAGE)] for table, length in zip(self.tables, lengths, strict=True)]
        self._set(kept, lengths, self.held_from)

    def drop(self, before: int) -> None:
        """Give pages back that hold only tokens before number `before`; none before it is seen from now on."""
        for i, table in enumerate(self.tables):
            held = self.held_from[i]
            if before <= held:
                continue
            self.held_from[i] = before
            self.sequences[i].start = max(self.sequences[i].start, before)
            for at in range(held // PAGE, min(before // PAGE, len(table))):
                if table[at] is not None:
                    self._replace(i, at, None)

    def choose(self, indices: Sequence[int]) -> None:
        """Let the sequences be those that `indices` name, in that order; one may be named again, and shares pages."""
        held, lengths = self.held_from, self.lengths
        self._set([self.tables[i] for i in indices], [lengths[i] for i in indices], [held[i] for i in indices])

    @classmethod
    def together(cls, others: Sequence[Pages]) -> Pages:
        """The sequences of all `others`, of any lengths; whoever writes to a page that they share takes a copy first.
        Raises NativeError where they keep tokens in different ways."""
        kinds = {(o.kind, o.heads, o.size, o.value_size, o.joined, o.window) for o in others}
        if len(kinds) != 1:
            raise NativeError(f"cache: found {len(kinds)} kinds of pages, expected those of one layer.")
        first = others[0]
        made = cls(first.kind, first.heads, first.size, first.value_size, first.name, first.joined, first.window)
        parts = [[(table, n, held) for table, n, held in zip(o.tables, o.lengths, o.held_from, strict=True)]
                 for o in others]  # fmt: skip
        made._set(*(list(column) for column in zip(*itertools.chain.from_iterable(parts), strict=True)))
        for other in others:
            other.room = 0  # its last page is shared now
        return made

    def hold(self, table: Sequence[Page | None], length: int, held_from: int = 0) -> None:
        """Be one sequence of `length` tokens in pages that others hold too; None for a page before `held_from`."""
        self._set([list(table)], [length], [held_from])

    def clear(self) -> None:
        self._set([], [], [])

    def __del__(self) -> None:
        for page in (page for table in getattr(self, "tables", ()) for page in table if page is not None):
            page.users -= 1  # or whoever holds it last would copy it before he writes

    def alone(self, i: int) -> Pages:
        """Sequence `i` by itself, which shares pages until either writes."""
        return self._shared([self.tables[i]], [self.sequences[i].length], [self.held_from[i]])

    def _shared(self, tables: list[list[Page | None]], lengths: list[int], held_from: list[int]) -> Pages:
        other = Pages(self.kind, self.heads, self.size, self.value_size, self.name, self.joined, self.window)
        other._set(tables, lengths, held_from)
        self.room = 0  # its last page is shared now
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Pages:
        """Another of the same tokens, which shares pages until either writes."""
        return self._shared(self.tables, self.lengths, self.held_from)

    def __copy__(self) -> Pages:
        return copy.deepcopy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: each page once, however many tables name it."""
        made = self.kind, self.heads, self.size, self.value_size, self.name, self.joined, self.window
        pages = list({id(page): page for table in self.tables for page in table if page is not None}.values())
        number = {id(page): i for i, page in enumerate(pages)}
        tables = [[None if page is None else number[id(page)] for page in table] for table in self.tables]
        return _restored, (made, [page.data for page in pages], tables, self.lengths, self.held_from)

    # --- as tensors -------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys [B, C, S, D] and values [B, C, S, V] of S more tokens, rounded to what is kept."""
        batch, _, tokens, _ = keys.shape
        self.make_room(batch, tokens)
        for i, length in enumerate(self.lengths):
            done = 0
            while done < tokens:
                at, row = divmod(length + done, PAGE)
                count = min(PAGE - row, tokens - done)
                page = self.tables[i][at].data
                for part, new in zip(self._parts(page), (keys, values), strict=True):
                    part[:, row : row + count] = self._stored(new[i, :, done : done + count])
                done += count
            self.sequences[i].length = length + tokens

    def gathered(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys [B, C, T, D] and values [B, C, T, V] of the tokens from number `first` on: copies, float32 of q8_0.
        Raises NativeError where they are ragged."""
        if self.ragged:
            raise NativeError(f"{self.name}: found sequences of {self.lengths} tokens, expected the same of each.")
        pages = range(first // PAGE, -(-self.length // PAGE))
        begin, end = first - pages.start * PAGE, self.length - pages.start * PAGE
        both = []
        for which in range(2):
            parts = [
                torch.cat([self._numbers(self._parts(table[at].data)[which]) for at in pages], 1)[:, begin:end]
                for table in self.tables
            ]
            both.append(torch.stack(parts))
        return both[0], both[1]

    def _parts(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a page as [C, 64, D] and [C, 64, V] of numbers, of q8_0 [.., bytes]."""
        dtype = TORCH_TYPES.get(self.kind, torch.uint8)
        if self.joined:
            rows = page.view(dtype).view(self.heads, PAGE, -1)
            key = rows.shape[-1] * self.size // (self.size + self.value_size)
            return rows[..., :key], rows[..., key:]
        keys, values = page[: self.values_at].view(dtype), page[self.values_at :].view(dtype)
        return keys.view(self.heads, PAGE, -1), values.view(self.heads, PAGE, -1)

    def _stored(self, numbers: Tensor) -> Tensor:
        if self.kind in TORCH_TYPES:
            return numbers
        return encode(numbers.flatten(0, -2), self._type).view(*numbers.shape[:-1], -1)

    def _numbers(self, part: Tensor) -> Tensor:
        if self.kind in TORCH_TYPES:
            return part
        part = part.contiguous()
        size = part.shape[-1] // self._type.nbytes * self._type.block
        rows = part.reshape(-1, part.shape[-1])
        return Packed(rows.contiguous().view(-1), self._type, (len(rows), size)).dequantize().view(*part.shape[:2], -1)


def _restored(
    made: tuple, data: list[Tensor], tables: list[list[int | None]], lengths: list[int], held_from: list[int]
) -> Pages:
    """Undoes `Pages.__reduce__`."""
    pages, held = Pages(*made), [Page(one) for one in data]
    pages._set([[None if n is None else held[n] for n in table] for table in tables], lengths, held_from)
    return pages
