"""Embedding tables: the checkpoint's own bytes on the CPU, of which a token reads one row.

A dense table in bf16 is often the largest thing in memory that is not an expert, and nothing is computed with it. On
another device, for a family's own kind of embedding, and where a format is not computed in C, the table is dense.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.models.traits import TRAITS
from ktransformers.operators.base_operator import FamilyOperator
from ktransformers.operators.combining import has_hooks
from ktransformers.operators.inner_ops import dtype_problem, is_cpu, stored_problem
from ktransformers.operators.linear import packed_dense
from ktransformers.operators.packed_weight import PackedWeight
from ktransformers.operators.trained import dense
from ktransformers.operators.twin import original


class KTransformersEmbedding(FamilyOperator):
    """ids [...] -> [..., H] in the model's dtype."""

    replaces = "an embedding table"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dtype = self.orig_module.weight.dtype
        self.table: native.Embedding | None = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["embedding"](module)

    def packs(self) -> bool:
        """Whether the table stays as it is stored."""
        weights, name = self.gguf_loader, f"{self.key}.weight"
        if type(self.orig_module) is not nn.Embedding or self.orig_module.max_norm is not None:
            return False
        if not is_cpu(self.generate_device) or not weights.has(name) or not weights.can_pack(name):
            return False
        return native.available() and not dtype_problem(self.dtype, "") and not stored_problem(weights, [name], "")

    def load(self) -> None:
        if not self.packs():
            super().load()
            return
        self.loads += 1
        self.table = native.Embedding(self.gguf_loader.packed(f"{self.key}.weight"), self.key)
        self._parameters.pop("weight", None)

    def unload(self) -> None:
        super().unload()
        self.table = None

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """True makes a packed table a dense one, to be trained; see trained.py."""
        if requires_grad and self.table is not None:
            self._parameters.update(dense(self.bare(), self.key, self.gguf_loader, self.generate_device)._parameters)
            self.table = None
            self.loads += 1
        return super().requires_grad_(requires_grad)

    def bare(self) -> nn.Module:
        if self.table is None:
            return self.orig_module
        made = copy.copy(self.orig_module)
        shape = (self.num_embeddings, self.embedding_dim)
        made._parameters = {"weight": nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"))}
        return made

    def __getattr__(self, name: str) -> Any:
        """Called for what is not found: `weight` while the table is packed."""
        if name == "weight" and self.__dict__.get("table") is not None:
            shape = (self.num_embeddings, self.embedding_dim)
            return PackedWeight(self.key, shape, self.dtype, "cpu", "leave this module out of the rules to have one")
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        return super().forward(input) if self.table is None else self.table.forward(input.cpu(), self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """`.to(dtype)` and kin: rows come in that dtype."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return sizes if self.table is None else f"{sizes}, {self.table.weight.type.name}"


def table_of(embedding: nn.Module) -> tuple[native.Embedding, torch.dtype] | None:
    """The rows of an embedding as the C library reads them, without a copy, and the dtype that it gives; None for one
    that does more, is watched, or is elsewhere."""
    if has_hooks(embedding) or type(original(embedding)) is not nn.Embedding or embedding.training:
        return None
    if isinstance(embedding, KTransformersEmbedding) and embedding.table is not None:
        return embedding.table, embedding.dtype
    packed = packed_dense(embedding.weight) if embedding.max_norm is None else None
    return None if packed is None else (native.Embedding(packed), embedding.weight.dtype)
