"""What of a captured step is computed outside of its graph: embedding tables and the head, where they are elsewhere.

A table stays on the CPU, as it is stored: a graph cannot look up in it. So while a step is captured a stand-in gives
memory that the token's row is copied to; whatever else of the family's code reads ids reads them on the device.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.errors import UnsupportedError
from ktransformers.machine.streams import Streams
from ktransformers.models.traits import TRAITS
from ktransformers.operators.decoding import decoder_of, head_of
from ktransformers.operators.embedding import KTransformersEmbedding
from ktransformers.operators.inner_ops import StagedOperator


def device_of(model: nn.Module) -> torch.device:
    """Where the layers of `model` compute; `model.device` is where its embedding is."""
    decoder = decoder_of(model)
    first = None if decoder is None else next(decoder.layers[0].parameters(), None)
    return model.device if first is None else first.device


def is_elsewhere(module: nn.Module, device: torch.device) -> bool:
    """Whether `module` computes on another device, or in C, which a stream does not wait for."""
    if isinstance(module, KTransformersEmbedding) and module.table is not None:
        return True
    if isinstance(module, StagedOperator) and getattr(module.active, "cpu_only", False):
        return True
    return any(tensor is not None and tensor.device != device for tensor in module._parameters.values())


class Row(nn.Module):
    """In the place of an embedding while a step is captured: gives the row [1, 1, H] of the token of `look_up`."""

    def __init__(self, table: nn.Module, ids: Tensor, streams: Streams) -> None:
        """`ids` [1, 1]: those that the step is captured with."""
        super().__init__()
        self.__dict__["table"] = table
        self._ids, self._streams = ids, streams
        row = self._of(0)
        self._pinned = streams.pinned(*row.shape, dtype=row.dtype)
        self._row = torch.empty(row.shape, dtype=row.dtype, device=ids.device)

    def _of(self, token: int) -> Tensor:
        """No call of the module: hooks would move what it gives."""
        return self.table.forward(torch.full((1, 1), token, dtype=torch.int64, device="cpu")).cpu()

    def look_up(self, token: int) -> None:
        """Have the stream copy the token's row to the device."""
        row = self._of(token)
        self._streams.wait()  # for the copy before
        self._pinned.copy_(row)
        self._row.copy_(self._pinned, non_blocking=True)

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        if input.numel() != 1 or input.data_ptr() != self._ids.data_ptr():
            name = type(self.table).__name__
            raise UnsupportedError(f"{name}: found ids that were computed, expected the step's own.")
        return self._row

    def __getattr__(self, name: str) -> Any:
        """Families ask embeddings for their weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["table"], name)


class Rows:
    """The tables of `model` that are not on the device of `ids`."""

    def __init__(self, model: nn.Module, ids: Tensor, streams: Streams) -> None:
        made: dict[int, Row] = {}
        self._places: list[tuple[dict[str, nn.Module | None], str, Row]] = []
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None and TRAITS["embedding"](child) and is_elsewhere(child, ids.device):
                    if id(child) not in made:
                        made[id(child)] = Row(child, ids, streams)
                    self._places.append((parent._modules, name, made[id(child)]))
        self._rows = list(made.values())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the stand-ins are the model's."""
        try:
            for modules, name, row in self._places:
                modules[name] = row
            yield
        finally:
            for modules, name, row in self._places:
                modules[name] = row.table

    def look_up(self, token: int) -> None:
        for row in self._rows:
            row.look_up(token)


def head_elsewhere(model: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module] | None:
    """The decoder and the head of `model` where the head is elsewhere; None where it is on `device`. Raises
    UnsupportedError where the model makes logits otherwise than by such a head alone."""
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    if head is None or not is_elsewhere(head, device):
        return None
    if decoder is None or head_of(model, decoder) is not head:
        raise UnsupportedError(f"{type(head).__name__}: found more than it in what makes logits, on several devices.")
    return decoder, head
