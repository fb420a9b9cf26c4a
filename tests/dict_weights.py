"""Weights from a dict of tensors, with the interface of `ktransformers.loaders.ModelWeights`."""

from types import SimpleNamespace

import torch

from ktransformers.errors import WeightError
from ktransformers.loaders import ExpertWeights
from ktransformers.quants.blocks import QUANT_TYPES, Packed, quant_type


class DictWeights:
    """Stands in for an open checkpoint. `types`: name -> GGUF type that its tensor is quantized to first."""

    def __init__(self, tensors: dict[str, torch.Tensor], types: dict[str, str] | None = None):
        self.tensors = {name: t.detach() for name, t in tensors.items()}
        self.types = types or {}

    def names(self):
        return list(self.tensors)

    def has(self, name):
        return name in self.tensors

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def quant_type(self, name):
        native = {kind.torch_dtype: kind.name for kind in QUANT_TYPES.values() if kind.torch_dtype}
        return self.types.get(name) or native[self.tensors[name].dtype]

    def infos(self, name):
        return [SimpleNamespace(type=quant_type(self.quant_type(name)))]

    def nbytes(self, name):
        shape = self.shape(name)
        return quant_type(self.quant_type(name)).packed_bytes(shape)

    def can_pack(self, name):
        return self.has(name)

    def packed(self, name):
        if name not in self.tensors:
            raise WeightError(f"no {name}")
        tensor = self.tensors[name].contiguous()
        if name in self.types:
            import gguf

            kind = getattr(gguf.GGMLQuantizationType, self.types[name])
            data = torch.from_numpy(gguf.quantize(tensor.float().numpy(), kind)).reshape(-1)
            return Packed(data, quant_type(self.types[name]), tuple(tensor.shape))
        return Packed(
            tensor.view(-1).view(torch.uint8), quant_type(self.quant_type(name)), tuple(tensor.shape)
        )

    def tensor(self, name, device="cpu", dtype=None):
        return self.packed(name).dequantize(dtype or torch.float32, device)

    def same(self, name, other):
        return name not in self.tensors or other not in self.tensors or self.tensors[name] is self.tensors[other]

    def methods(self, name):
        return ["LLAMAFILE"] if name in self.types else [self.quant_type(name)]

    def is_stored_as(self, name, method):
        return self.methods(name) == [method]

    def experts_problem(self, prefix):
        return ""

    def has_experts(self, prefix):
        return self.has(f"{prefix}.gate_up_proj")

    def experts(self, prefix):
        gate_up, down = self.packed(f"{prefix}.gate_up_proj"), self.packed(f"{prefix}.down_proj")
        count, half = gate_up.shape[0], gate_up.shape[1] // 2
        return ExpertWeights(
            gate=[gate_up.expert(e).rows(0, half) for e in range(count)],
            up=[gate_up.expert(e).rows(half, 2 * half) for e in range(count)],
            down=[down.expert(e) for e in range(count)],
        )
