"""Decoding of one sequence, recorded: the calls of a step with their memory, made once and replayed for each token."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native.checks import DTYPES
from ktransformers.native.library import pooled
from ktransformers.native.pages import Pages

if TYPE_CHECKING:
    from ktransformers.native.delta_net import Kept
    from ktransformers.native.embedding import Embedding
    from ktransformers.native.layers import Layers
    from ktransformers.native.linear import Linear

Tables = Sequence["tuple[torch.Tensor, torch.Tensor] | None"]
"""cos and sin of each kind of layer, a row a position: [1, P, R] each."""


class Decode:
    """token -> logits of the next: embedding row, layers, norm, output matrix. For one sequence in one thread."""

    def __init__(
        self,
        embedding: Embedding,
        layers: Layers,
        head: Linear,
        held: Sequence[Pages | Kept],
        tables: Callable[[int], Tables],
        dtype: torch.dtype,
        factor: float = 1.0,
    ) -> None:
        """`layers`: nobody else's. `held`: pages of each, or what is kept for a delta net. `tables(P)`: angles of at
        least P positions. `dtype`: of hidden states. `factor`: of what the embedding gives. Raises NativeError where
        sizes differ."""
        sizes = {embedding.hidden, layers.hidden, head.in_features}
        if len(sizes) > 1:
            raise NativeError(f"decode: found hidden sizes {sorted(sizes)}, expected one.")
        self._embedding, self._layers, self._head, self._held = embedding, layers, head, list(held)
        self._pages = [each for each in held if isinstance(each, Pages)]
        self._nets = [each for each in held if not isinstance(each, Pages)]
        self._tables, self._factor = tables, factor
        state, self._pool = pooled()
        self._state, self._dtype = state, DTYPES[dtype]
        self._hidden = torch.empty(1, 1, layers.hidden, dtype=dtype, device="cpu")
        self._out = torch.empty_like(self._hidden)
        self._logits = torch.empty(head.out_features, dtype=dtype, device="cpu")
        self._id = state.ffi.new("int64_t *")
        self._hidden_at, self._out_at, self._logits_at = map(self._address, (self._hidden, self._out, self._logits))
        self._bias = state.ffi.NULL if head.bias is None else state.ffi.cast("float *", head.bias.data_ptr())
        self._past, self._left = -1, 0  # tokens before this one, and how many more there is room for
        self._kept: Any = None
        self._known: list[tuple[Pages, Any, int]] = []
        self._tensors: list[torch.Tensor] = []  # of delta nets
        self._angles: list[tuple[Any, int, int, int]] = []  # a call, where its cos and sin are, bytes of a row

    def _address(self, tensor: torch.Tensor) -> Any:
        return self._state.ffi.cast("void *", tensor.data_ptr())

    def __call__(self, token: int) -> torch.Tensor:
        """The number of the token -> logits [V], in memory that the next call writes to again."""
        lib, check = self._state.lib, self._state.check
        if not self._left or self._past != self._pages[0].length or not self._is_there():
            self._renew()
        for call, cos, sin, row in self._angles:
            call.cos = self._state.ffi.cast("void *", cos + row * self._past)
            call.sin = self._state.ffi.cast("void *", sin + row * self._past)
        self._id[0] = token
        if lib.kt_embed(self._embedding.packed, self._id, 1, self._hidden_at, self._dtype):
            raise NativeError(f"decode: found token {token}, expected one from 0 to {self._embedding.count - 1}.")
        if self._factor != 1.0:
            self._hidden *= self._factor
        check(lib.kt_layers_forward(self._layers.stack, self._pool, self._hidden_at, self._out_at), self._layers.name)
        self._past, self._left = self._past + 1, self._left - 1
        logits_of = self._pool, self._head.packed, self._bias, self._out_at, self._dtype, 1, self._logits_at
        check(lib.kt_linear(*logits_of), self._head.name)
        return self._logits

    def _is_there(self) -> bool:
        """Whether C still knows where everything kept is, and no page was shared since."""
        there = all(pages.sequences is at and pages.room == room for pages, at, room in self._known)
        return there and all(map(operator.is_, self._now(), self._tensors))

    def _now(self) -> list[torch.Tensor]:
        return [tensor for net in self._nets for tensor in net.tensors()]

    def _renew(self) -> None:
        """Have room for another token, and say so to C; done again when a page is full."""
        past = self._pages[0].length
        tables = self._tables(past + 1)
        now = [None if table is None else tuple(part[:, past : past + 1] for part in table) for table in tables]
        kept = self._layers.fill(self._state, self._hidden, self._held, now)
        self._tensors = self._now()
        self._past, self._left, self._angles = past, min(pages.room for pages in self._pages) - past, []
        for i, table in zip(self._layers.first, tables, strict=True):
            if table is not None:
                whole = [self._layers.layers[i].mixer.angles(part, 1, part.shape[1]) for part in table]
                row = whole[0].stride(1) * whole[0].element_size()
                self._angles.append((self._layers.calls[i], *(part.data_ptr() for part in whole), row))
                self._left = min(self._left, whole[0].shape[1] - past)
                kept += whole
        self._kept, self._known = kept, [(pages, pages.sequences, pages.room) for pages in self._pages]
