"""Angles of rotary positions for a native call: rows of a table where a token's row depends on its position alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.operators.twin import original

_FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Kinds of rotary embeddings whose frequencies do not depend on the length of the context."""
_LEAST, _MOST = 1024, 1 << 17  # rows; beyond that somebody numbers tokens as he likes


class Angles:
    """cos and sin as a rotary `module` of a family gives them with `more` arguments: (positional, by name). `axes`: of
    how many numbers a token's position is for it, all alike for text; 0: of one, which is no list."""

    def __init__(self, module: nn.Module, more: tuple[tuple, tuple], axes: int = 0) -> None:
        self.module, self.more, self.named, self.axes = module, more[0], dict(more[1]), axes
        self.fixed = is_fixed(original(module))
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def of(self, hidden: Tensor, past: int, where: Tensor | None) -> tuple[Tensor, Tensor]:
        """[1 or B, S, R] each for tokens at `where` [1 or B, S], or for the S of `hidden` after `past` others."""
        tokens = hidden.shape[1]
        if where is None:
            if not self.fixed:
                return self._computed(hidden, torch.arange(past, past + tokens, device="cpu")[None])
            return tuple(table[:, past : past + tokens] for table in self.table(hidden, past + tokens))
        first, last = (int(x) for x in where.aminmax())
        if not self.fixed or first < 0 or last >= max(_MOST, past + tokens):
            return self._computed(hidden, where)
        return tuple(table[0][where.long()] for table in self.table(hidden, last + 1))

    def table(self, hidden: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """[1, at least `rows`, R] each of the first positions, in the dtype of `hidden`; of `fixed` kinds only."""
        table = self._tables.get(hidden.dtype)
        if table is None or table[0].shape[1] < rows:
            count = max(_LEAST, 1 << (rows - 1).bit_length())
            self._tables[hidden.dtype] = table = self._computed(hidden, torch.arange(count, device="cpu")[None])
        return table

    def _computed(self, hidden: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        where = where.expand(self.axes, *where.shape) if self.axes else where
        given = self.module(hidden, where, *self.more, **self.named)
        parts = (given.real, given.imag) if isinstance(given, Tensor) else given  # complex factors
        return tuple(part.contiguous() for part in parts)


def is_fixed(module: nn.Module) -> bool:
    """Whether a token's angles depend on its position alone."""
    kinds: Any = getattr(module, "rope_type", None)
    return set(kinds.values() if isinstance(kinds, Mapping) else (kinds,)) <= _FIXED
